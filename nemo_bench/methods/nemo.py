"""NeMo: switch off the value neurons that make a prompt memorized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion, Measure
from nemo_bench.errors import ConfigError
from nemo_bench.localization import PROTOCOLS, SEEDS, NemoSettings, Velocity, localize
from nemo_bench.methods.base import Batch, Method
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Localization, Prompt
from nemo_bench.records.ranges import Positive


@dataclass(eq=False)
class BlockNeurons(Method):
    """Multiplies the outputs of each row's localized neurons by a factor; 0 switches them off."""

    touches = "value neurons of cross-attention"
    localizes = True
    auditable = True

    factor: float = field(default=0.0, kw_only=True)

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        with model.block(batch.neurons, self.factor):
            yield batch


@dataclass(eq=False)
class NeMo(BlockNeurons, NemoSettings):
    """Localizes by outlier activations and refinement on noise differences, then blocks these neurons.

    NeMo is made for prompts that are known to be memorized. Its gate is no detector: as published, 226 of the 320
    general prompts of the embedded model's calibration pass (71%, ``nemo-bench calibrate``), the selection then runs
    out, and blocking harms their images; with ``gate="maxima"`` 43 pass.

    The other settings are those of :class:`NemoSettings`.
    """

    title = "NeMo"
    summary = "value neurons with outlier activations, refined on noise differences, switched off"
    sourcing = "paper and public code"
    citation = cite("hintersdorf2024nemo")
    needs_calibration = True

    #: ``"paper"``, or ``"reference"`` for the public scripts; see :class:`Protocol`.
    protocol: Literal["paper", "reference"] = "paper"
    neurons: Literal["refined", "initial"] = "refined"  #: Blocked set: ``"refined"`` or the ``"initial"`` candidates.
    #: Measure of noise differences: ``"published"``, ``"current"`` or ``"fixed"``, see
    #: :data:`nemo_bench.diffusion.Measure`; None takes the protocol's.
    similarity: Measure | None = None
    #: Noise differences of a model that predicts velocity: of ``"converted"`` noise or ``"raw"`` velocity; None takes
    #: the protocol's.
    velocity: Velocity | None = None
    #: Guidance scale while localizing, with the two halves swapped as in the public scripts: conditional + scale
    #: (unconditional - conditional). None takes the conditional prediction.
    guidance: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta <= self.theta_min:
            raise ConfigError(f"NeMo: theta={self.theta}; expected more than theta_min={self.theta_min}")
        if not (self.outliers or self.top_k):
            raise ConfigError("NeMo needs candidates: set outliers=true, top_k=true or both")
        self.memorization_threshold = self.threshold
        self.noise_protocol = PROTOCOLS[self.protocol].changed(self.similarity, self.velocity, self.guidance)

    @property
    @override
    def calibrates_threshold(self) -> bool:
        gates_by_maxima = self.gate == "maxima" and self.gate_threshold is None
        return gates_by_maxima or super().calibrates_threshold

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        if self.calibration is None:
            raise ConfigError("NeMo needs a calibration: call calibrate(model, prompts), or setup with a calibration")
        if latents is None:
            latents = self.noise_protocol.latents(model, seeds_of(prompt, "localize", range(SEEDS)))
        text = model.encode([prompt.text])
        result = localize(model, text, latents, self.calibration, self, self.noise_protocol, self.batch_size)
        blocks_nothing = bool(result.exhausted) and self.when_exhausted == "nothing"
        if self.neurons == "refined" or blocks_nothing:
            return result
        return replace(result, neurons=result.initial, listed=result.listed_initial, refined_score=result.initial_score)
