"""What a mitigation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nemo_bench.diffusion import Conditioning, Diffusion
from nemo_bench.localization import Calibration
from nemo_bench.types import Localization, Neurons, Prompt


@dataclass(frozen=True)
class Batch:
    """Images about to be generated, one per row.

    Attributes:
        prompts: Prompt of each row.
        text: Conditioning of each row.
        latents: Starting noise of each row.
        neurons: What localizing found for the prompt of each row.
    """

    prompts: tuple[Prompt, ...]
    text: Conditioning
    latents: Tensor
    neurons: tuple[Neurons, ...]


class Method(ABC):
    """A mitigation: optionally localizes neurons for a prompt, and changes how a batch is generated.

    Attributes:
        title: Name in tables.
        summary: One line for ``nemo-bench ls``.
        citation: BibTeX of the source, empty for a control of our own.
        needs_calibration: Whether :attr:`calibration` must be set before localizing.
        source: Another method whose localization this one starts from, or None.
        calibration: Statistics of the model, set by the run.
    """

    title: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str] = ""
    needs_calibration: ClassVar[bool] = False
    source: Method | None = None
    calibration: Calibration | None = None

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor, found: Localization | None) -> Localization:
        """Finds the neurons to block for a prompt.

        Args:
            model: The model, nothing blocked.
            prompt: The prompt.
            latents: Starting noise of the seeds to localize on, (S, channels, height, width).
            found: What :attr:`source` found for this prompt, if there is a source.

        Returns:
            The localization; empty unless overridden.
        """
        return Localization()

    @abstractmethod
    def apply(self, model: Diffusion, batch: Batch) -> AbstractContextManager[Batch]:
        """Opens the mitigation for one batch; on exit the model is as it was.

        Args:
            model: The model.
            batch: What would be generated without mitigation.

        Returns:
            Context manager that gives the batch to generate from.
        """
