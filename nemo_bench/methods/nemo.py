"""NeMo: switch off the value neurons found to make a prompt memorized."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from torch import Tensor

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError
from nemo_bench.localization import NemoSettings, localize
from nemo_bench.methods.base import Batch, Method
from nemo_bench.types import Localization, Prompt


class BlockNeurons(Method):
    """Generates with each row's own neurons multiplied by a factor.

    Args:
        factor: What the outputs of blocked neurons are multiplied by; 0 switches off.
    """

    def __init__(self, factor: float = 0.0) -> None:
        self.factor = factor

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        with model.block(batch.neurons, self.factor):
            yield batch


class NeMo(BlockNeurons):
    """Localizes by outlier activations and refinement on noise differences, then blocks what was found.

    Args:
        protocol: ``"paper"``: first step's timestep, no guidance, one generator per seed, no duplicate candidates.
        neurons: Which set is blocked: ``"refined"`` or the ``"initial"`` candidates.
        theta: First outlier threshold, in standard deviations.
        theta_step: How much it falls per round.
        theta_min: Where the search ends; never tested itself.
        threshold: Memorization threshold in [-1, 1]; None takes the calibrated one.
        factor: What the outputs of blocked neurons are multiplied by.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "NeMo"
    summary = "value neurons with outlier activations, refined on noise differences, switched off"
    citation = """@inproceedings{hintersdorf2024nemo,
  title = {Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models},
  author = {Hintersdorf, Dominik and Struppek, Lukas and Kersting, Kristian and Dziedzic, Adam and Boenisch, Franziska},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2406.02366},
  archivePrefix = {arXiv}
}"""
    needs_calibration = True

    def __init__(
        self,
        protocol: Literal["paper"] = "paper",
        neurons: Literal["refined", "initial"] = "refined",
        theta: float = 5.0,
        theta_step: float = 0.25,
        theta_min: float = 1.0,
        threshold: float | None = None,
        factor: float = 0.0,
    ) -> None:
        super().__init__(factor)
        if not (math.inf > theta > theta_min >= 0 and theta_step > 0):
            msg = f"nemo needs theta > theta_min >= 0 and theta_step > 0, given {theta}, {theta_min}, {theta_step}"
            raise ConfigError(msg)
        if threshold is not None and not -1 <= threshold <= 1:
            raise ConfigError(f"nemo needs a threshold from -1 to 1, a similarity, given {threshold}")
        self.protocol, self.neurons = protocol, neurons
        self.settings = NemoSettings(theta, theta_step, theta_min, factor, threshold)

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor, found: Localization | None) -> Localization:
        """See :meth:`Method.localize`.

        Raises:
            ConfigError: The model has not been calibrated.
        """
        if self.calibration is None:
            raise ConfigError("NeMo needs the statistics of the model: set calibration, or run `nemo-bench calibrate`")
        result = localize(model, model.encode([prompt.text]), latents, self.calibration, self.settings)
        if self.neurons == "initial":
            return replace(result, neurons=result.initial, refined_score=result.initial_score)
        return result
