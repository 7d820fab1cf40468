"""NeMo: switch off the value neurons found to make a prompt memorized."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from torch import Tensor

from nemo_bench.diffusion import Diffusion, Measure
from nemo_bench.errors import ConfigError
from nemo_bench.localization import LAST_K, PROTOCOLS, SEEDS, NemoSettings, Velocity, localize
from nemo_bench.methods.base import Batch, Method
from nemo_bench.prompts.data import seeds_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Localization, Prompt


class BlockNeurons(Method):
    """Generates with each row's own neurons multiplied by a factor.

    Args:
        factor: What the outputs of blocked neurons are multiplied by; 0 switches off.
    """

    touches = "value neurons of cross-attention"
    auditable = True

    def __init__(self, factor: float = 0.0) -> None:
        self.factor = factor

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        with model.block(batch.neurons, self.factor):
            yield batch


class NeMo(BlockNeurons):
    """Localizes by outlier activations and refinement on noise differences, then blocks what was found.

    It is for prompts that are known to be memorized. Its gate tells them badly from others: as published, 226 of the
    320 general prompts of the embedded model's calibration pass (71%, ``nemo-bench calibrate``), the selection then
    runs out, and what is blocked harms them; with ``gate="maxima"`` 43 pass.

    Args:
        protocol: ``"paper"`` or ``"reference"``, what the public scripts do; see :class:`Protocol`.
        refinement: ``"sequential"`` as published, or ``"bisect"``, faster, checked for the same criterion; see
            :class:`NemoSettings`.
        neurons: Which set is blocked: ``"refined"`` or the ``"initial"`` candidates.
        theta: First outlier threshold, in standard deviations.
        theta_step: How much it falls per round.
        theta_min: Where the search ends; never tested itself.
        outliers: Whether outliers are candidates.
        top_k: Whether the most active neurons of each layer are candidates.
        threshold: Memorization threshold in [-1, 1]; None takes the calibrated one (published: 0.428).
        refine_threshold: Threshold of the refinement in [-1, 1]; None takes that of the selection.
        relative: Refine by relative change of the similarity, at most this part, instead of by threshold.
        gate: ``"pairs"``, as published: prompts pass the gate above the memorization threshold; or ``"maxima"``: above
            one calibrated from the most alike pair of each general prompt.
        when_exhausted: What is blocked where the selection runs out without meeting its criterion: ``"block"``, as
            published, what refinement keeps of the last candidates; or ``"nothing"``.
        factor: What the outputs of blocked neurons are multiplied by.
        gate_threshold: Similarity of two seeds above which a prompt counts as memorized, in [-1, 1]; None takes the
            threshold of the selection.
        initial_k: Most active neurons of each layer in the first round, 0 to 1279; each round takes one more.
        similarity: How noise differences are compared: ``"published"``, ``"current"`` or ``"fixed"``, see
            :data:`nemo_bench.diffusion.Measure`; None takes the protocol's.
        velocity: What noise differences of a model that predicts velocity are taken from, ``"converted"`` noise or
            ``"raw"`` velocity; None takes the protocol's.
        guidance: Scale of guidance while localizing, with the two halves swapped as in the public scripts:
            conditional + scale (unconditional - conditional). None takes the conditional prediction.

    Raises:
        ConfigError: A number is out of range.
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
        theta: float = 5.0,
        theta_step: float = 0.25,
        theta_min: float = 1.0,
        outliers: bool = True,
        top_k: bool = True,
        threshold: float | None = None,
        refine_threshold: float | None = None,
        relative: float | None = None,
        gate: Literal["pairs", "maxima"] = "pairs",
        when_exhausted: Literal["block", "nothing"] = "block",
        factor: float = 0.0,
        gate_threshold: float | None = None,
        initial_k: int = 0,
        similarity: Measure | None = None,
        velocity: Velocity | None = None,
        guidance: float | None = None,
    ) -> None:
        super().__init__(factor)
        if not (math.inf > theta > theta_min >= 0 and theta_step > 0):
            msg = f"nemo needs theta > theta_min >= 0 and theta_step > 0, given {theta}, {theta_min}, {theta_step}"
            raise ConfigError(msg)
        thresholds = {"threshold": threshold, "refine_threshold": refine_threshold, "gate_threshold": gate_threshold}
        for name, value in thresholds.items():
            if value is not None and not -1 <= value <= 1:
                raise ConfigError(f"nemo needs a {name} from -1 to 1, a similarity, given {value}")
        if relative is not None and not 0 < relative < math.inf:
            raise ConfigError(f"nemo needs relative above 0, a part of a similarity, given {relative}")
        if not (outliers or top_k):
            raise ConfigError("nemo needs candidates: set outliers=true, top_k=true or both")
        if not 0 <= initial_k < LAST_K:
            raise ConfigError(f"nemo needs initial_k from 0 to {LAST_K - 1}, given {initial_k}")
        if guidance is not None and not 0 < guidance < math.inf:
            raise ConfigError(f"nemo needs guidance above 0, or null for none, given {guidance}")
        self.protocol = PROTOCOLS[protocol].changed(similarity, velocity, guidance)
        self.neurons, self.threshold = neurons, threshold
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
    def calibrates_threshold(self) -> bool:
        """See :attr:`Method.calibrates_threshold`."""
        own_gate = self.settings.gate_threshold is not None
        return self.threshold is None or (self.settings.gate == "maxima" and not own_gate)

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        """See :meth:`Method.localize`.

        Raises:
            ConfigError: The model has not been calibrated.
        """
        if self.calibration is None:
            raise ConfigError("NeMo needs to know general prompts: call calibrate(model, prompts), or set calibration")
        if latents is None:
            latents = self.protocol.latents(model, seeds_of(prompt, "localize", range(SEEDS)))
        text = model.encode([prompt.text])
        result = localize(model, text, latents, self.calibration, self.settings, self.protocol, self.batch_size)
        is_left_alone = bool(result.exhausted) and self.settings.when_exhausted == "nothing"
        if self.neurons == "initial" and not is_left_alone:
            return replace(
                result,
                neurons=result.initial,
                listed=result.listed_initial,
                refined_score=result.initial_score,
            )
        return result
