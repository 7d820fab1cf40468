"""NeMo: switch off the value neurons that make a prompt memorized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import FAMILIES, Diffusion
from nemo_bench.localization import SEEDS, NemoSearch
from nemo_bench.methods.base import Batch, Method
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Localization, Prompt


@dataclass(eq=False)
class BlockNeurons(Method):
    """Multiplies the outputs of each row's localized neurons by a factor; 0 switches them off."""

    touches = "value neurons of text"
    families = frozenset(FAMILIES)
    localizes = True
    auditable = True

    factor: float = field(default=0.0, kw_only=True)

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        with model.block(batch.neurons, self.factor):
            yield batch


@dataclass(eq=False)
class NeMo(BlockNeurons, NemoSearch):
    """Localizes by outlier activations and refinement on noise differences, then blocks these neurons.

    NeMo is made for prompts that are known to be memorized. Its gate is no detector: as published, 226 of the 320
    general prompts of the embedded model's calibration pass (71%, ``nemo-bench calibrate``), the selection then runs
    out, and blocking harms their images; with ``gate="maxima"`` 43 pass.

    The settings are those of :class:`NemoSettings` and :class:`NemoSearch`.
    """

    title = "NeMo"
    summary = "value neurons with outlier activations, refined on noise differences, switched off"
    sourcing = "paper and public code; transformers: ours"
    citation = cite("hintersdorf2024nemo")
    needs_calibration = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_settings()
        self.memorization_threshold = self.threshold
        self.noise_protocol = self.own_protocol

    @property
    @override
    def calibrates_threshold(self) -> bool:
        return self.needs_threshold

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        if latents is None:
            latents = self.noise_protocol.latents(model, seeds_of(prompt, "localize", range(SEEDS)))
        return self.search(model, prompt, self.calibration, latents, self.batch_size)
