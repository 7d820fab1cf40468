"""NeMo: switch off the value neurons that make a prompt memorized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion, Measure
from nemo_bench.errors import ConfigError
from nemo_bench.localization import LAST_K, PROTOCOLS, SEEDS, NemoSettings, Velocity, localize
from nemo_bench.methods.base import Batch, Method, Threshold
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Localization, Prompt
from nemo_bench.records.ranges import NotNegative, Positive


class BlockNeurons(Method):
    """Multiplies the localized neurons of each row by a factor.

    Args:
        factor: Multiplies the outputs of blocked neurons; 0 switches them off.
    """

    touches = "value neurons of cross-attention"
    localizes = True
    auditable = True

    def __init__(self, factor: float = 0.0) -> None:
        self.factor = factor

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        with model.block(batch.neurons, self.factor):
            yield batch


class NeMo(BlockNeurons):
    """Localizes by outlier activations and refinement on noise differences, then blocks these neurons.

    NeMo is made for prompts that are known to be memorized. Its gate is no detector: as published, 226 of the 320
    general prompts of the embedded model's calibration pass (71%, ``nemo-bench calibrate``), the selection then runs
    out, and blocking harms their images; with ``gate="maxima"`` 43 pass.

    Args:
        protocol: ``"paper"``, or ``"reference"`` for the public scripts; see :class:`Protocol`.
        refinement: ``"sequential"`` as published, or ``"bisect"``, faster, checked for the same criterion; see
            :class:`NemoSettings`.
        neurons: Blocked set: ``"refined"`` or the ``"initial"`` candidates.
        theta: First outlier threshold, in standard deviations.
        theta_step: Decrease of theta per round.
        theta_min: The search ends before it reaches this theta.
        outliers: Whether outliers are candidates.
        top_k: Whether the most active neurons of each layer are candidates.
        threshold: Memorization threshold; None takes the calibrated one (published: 0.428).
        refine_threshold: Threshold of the refinement; None takes that of the selection.
        relative: Refine by relative change of the similarity, at most this share, instead of by threshold.
        gate: ``"pairs"``, as published: prompts pass the gate above the memorization threshold; or ``"maxima"``: above
            one calibrated from the most alike pair of each general prompt.
        when_exhausted: Blocked set where the selection runs out without meeting its criterion: ``"block"``, as
            published, the refined last candidates; or ``"nothing"``.
        factor: Multiplies the outputs of blocked neurons.
        gate_threshold: Similarity of two seeds above which a prompt counts as memorized; None takes the threshold of
            the selection.
        initial_k: Most active neurons of each layer in the first round; each round takes one more.
        similarity: Measure of noise differences: ``"published"``, ``"current"`` or ``"fixed"``, see
            :data:`nemo_bench.diffusion.Measure`; None takes the protocol's.
        velocity: Noise differences of a model that predicts velocity: of ``"converted"`` noise or ``"raw"`` velocity;
            None takes the protocol's.
        guidance: Guidance scale while localizing, with the two halves swapped as in the public scripts:
            conditional + scale (unconditional - conditional). None takes the conditional prediction.

    Raises:
        ConfigError: theta starts below its end, or there are no candidates; without a calibration when localizing.
    """

    title = "NeMo"
    summary = "value neurons with outlier activations, refined on noise differences, switched off"
    sourcing = "paper and public code"
    citation = cite("hintersdorf2024nemo")
    needs_calibration = True

    def __init__(
        self,
        protocol: Literal["paper", "reference"] = "paper",
        refinement: Literal["sequential", "bisect"] = "sequential",
        neurons: Literal["refined", "initial"] = "refined",
        theta: Positive = 5.0,
        theta_step: Positive = 0.25,
        theta_min: NotNegative = 1.0,
        outliers: bool = True,
        top_k: bool = True,
        threshold: Threshold | None = None,
        refine_threshold: Threshold | None = None,
        relative: Positive | None = None,
        gate: Literal["pairs", "maxima"] = "pairs",
        when_exhausted: Literal["block", "nothing"] = "block",
        factor: float = 0.0,
        gate_threshold: Threshold | None = None,
        initial_k: Annotated[int, Field(ge=0, lt=LAST_K)] = 0,
        similarity: Measure | None = None,
        velocity: Velocity | None = None,
        guidance: Positive | None = None,
    ) -> None:
        super().__init__(factor)
        if theta <= theta_min:
            raise ConfigError(f"NeMo: theta={theta}; expected more than theta_min={theta_min}")
        if not (outliers or top_k):
            raise ConfigError("NeMo needs candidates: set outliers=true, top_k=true or both")
        self.neurons = neurons
        self.memorization_threshold = threshold
        self.protocol = PROTOCOLS[protocol].changed(similarity, velocity, guidance)
        self.settings = NemoSettings(
            theta=theta,
            theta_step=theta_step,
            theta_min=theta_min,
            factor=factor,
            threshold=threshold,
            outliers=outliers,
            top_k=top_k,
            refine_threshold=refine_threshold,
            relative=relative,
            refinement=refinement,
            gate=gate,
            when_exhausted=when_exhausted,
            gate_threshold=gate_threshold,
            initial_k=initial_k,
        )

    @property
    @override
    def calibrates_threshold(self) -> bool:
        gates_by_maxima = self.settings.gate == "maxima" and self.settings.gate_threshold is None
        return gates_by_maxima or super().calibrates_threshold

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        if self.calibration is None:
            raise ConfigError("NeMo needs a calibration: call calibrate(model, prompts), or setup with a calibration")
        if latents is None:
            latents = self.protocol.latents(model, seeds_of(prompt, "localize", range(SEEDS)))
        text = model.encode([prompt.text])
        result = localize(model, text, latents, self.calibration, self.settings, self.protocol, self.batch_size)
        blocks_nothing = bool(result.exhausted) and self.settings.when_exhausted == "nothing"
        if self.neurons == "refined" or blocks_nothing:
            return result
        return replace(result, neurons=result.initial, listed=result.listed_initial, refined_score=result.initial_score)
