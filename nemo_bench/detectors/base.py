"""What a detector is, and what it sees of sampling."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_bench.diffusion import FAMILIES, Conditioning, Diffusion
from nemo_bench.diffusion.noise import norms
from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.records.data import Prompt


def now(model: Diffusion) -> float:
    """Seconds on a clock, after all work of the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


@dataclass(frozen=True)
class Finding:
    """What a detector says of a prompt.

    Attributes:
        score: Larger for memorized prompts; where it is not finite, the detector failed.
        details: What explains it, as plain data; kept in the records.
        picture: Something to look at, (3, height, width) in [0, 1], or None.
        failed: Why there is no finite score, empty where there is one.
    """

    score: float
    details: Mapping[str, Any] = field(default_factory=dict)
    picture: Tensor | None = None
    failed: str = ""


class Predictions:
    """Noise predicted from N latents for a prompt and without one, each made when it is first asked for.

    Args:
        model: The model.
        latents: (N, channels, height, width).
        timestep: Training timestep, 0 to 999.
        text: Conditioning of N rows.
        conditional: Noise predicted for the prompts, if it is known.
        unconditional: Noise predicted for the empty prompt, if it is known.

    Attributes:
        passes: UNet passes of one sample made here.
        seconds: What they took.
    """

    def __init__(
        self,
        model: Diffusion,
        latents: Tensor,
        timestep: int,
        text: Conditioning,
        conditional: Tensor | None = None,
        unconditional: Tensor | None = None,
    ) -> None:
        self.model, self.latents, self.timestep, self.text = model, latents, timestep, text
        self._conditional, self._unconditional = conditional, unconditional
        self.passes, self.seconds = 0, 0.0

    def _predict(self, text: Conditioning) -> Tensor:
        start = now(self.model)
        noise = self.model.predict_noise(self.latents, self.timestep, text)
        self.passes += len(self.latents)
        self.seconds += now(self.model) - start
        return noise

    @property
    def conditional(self) -> Tensor:
        """Noise predicted for the prompts, float32, (N, channels, height, width)."""
        if self._conditional is None:
            self._conditional = self._predict(self.text)
        return self._conditional

    @property
    def unconditional(self) -> Tensor:
        """Noise predicted for the empty prompt, likewise."""
        if self._unconditional is None:
            self._unconditional = self._predict(self.model.unconditional(len(self.latents)))
        return self._unconditional


class View:
    """What one detector sees of one step of sampling, before its noise is taken off.

    Args:
        predictions: What all detectors share.
        rows: Which rows of it this one sees: N rows, one an image.
        number: Number of the step, from 0, the noisiest.
        lengths: Tokens of each row's prompt from begin to end token, padding not counted.
        attention: Attention of the layers asked for, (all rows, positions, tokens).
        seeds: Number of each row's seed, from 0; None for one prompt's rows in their order.

    Attributes:
        seeds: Number of each of the N rows' seed.
        lengths: Likewise the tokens of its prompt.
    """

    def __init__(
        self,
        predictions: Predictions,
        rows: Sequence[int],
        number: int,
        lengths: Sequence[int],
        attention: Mapping[str, Tensor] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.shared, self.index, self.number = predictions, list(rows), number
        self.model, self.timestep = predictions.model, predictions.timestep
        self._all = lengths, attention, seeds
        self.lengths = [lengths[row] for row in rows]
        self.seeds = self.index if seeds is None else [seeds[row] for row in rows]
        self._attention = attention or {}
        self._taken: dict[str, Tensor] = {}

    def split(self, size: int) -> list[View]:
        """The same step in views of so many rows at most, which share what it shares."""
        parts = [self.index[first : first + size] for first in range(0, len(self.index), size)]
        return [View(self.shared, part, self.number, *self._all) for part in parts]

    @property
    def latents(self) -> Tensor:
        """Noisy latents, (N, channels, height, width)."""
        return self.shared.latents[self.index]

    @property
    def text(self) -> Conditioning:
        """Conditioning of N rows."""
        return self.shared.text.rows(self.index)

    @property
    def conditional(self) -> Tensor:
        """Noise predicted for the prompts, float32, (N, channels, height, width)."""
        if "conditional" not in self._taken:
            self._taken["conditional"] = self.shared.conditional[self.index]
        return self._taken["conditional"]

    @property
    def unconditional(self) -> Tensor:
        """Noise predicted for the empty prompt, likewise."""
        if "unconditional" not in self._taken:
            self._taken["unconditional"] = self.shared.unconditional[self.index]
        return self._taken["unconditional"]

    def attention(self, layer: str) -> Tensor:
        """Cross-attention of a layer that was asked for: the mean over heads, (N, positions, tokens), sums are 1."""
        return self._attention[layer][self.index]

    @property
    def difference(self) -> Tensor:
        """What the prompt adds to the predicted noise, (N, channels, height, width)."""
        return self.conditional - self.unconditional

    @property
    def magnitude(self) -> Tensor:
        """L2 norm of :attr:`difference`, one an image, (N,)."""
        return norms(self.difference)

    def noises(self, timestep: int) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional noise predicted from these latents at a timestep; this step's own are shared.

        Args:
            timestep: Training timestep, 0 to 999.
        """
        if timestep == self.timestep:
            return self.conditional, self.unconditional
        model, empty = self.model, self.model.unconditional(len(self.index))
        conditional = model.predict_noise(self.latents, timestep, self.text)
        return conditional, model.predict_noise(self.latents, timestep, empty)

    @property
    def used(self) -> int:
        """Passes of one sample whose predictions were looked at; they are shared with other detectors."""
        return len(self._taken) * len(self.index)


class Detector(ABC):
    """Gives each prompt a score, larger for prompts that the model has memorized.

    Attributes:
        title: Name in tables.
        summary: One line for ``nemo-bench ls``.
        citation: BibTeX of the source, empty for one of your own.
        sourcing: What we were able to read of the source.
        families: Classes of the pipelines that it is made for.
        images: Whether it looks at finished images.
        attends: Whether it looks at cross-attention.
        derives: Whether it takes derivatives of the UNet, which a compiled one does not give; it is then shown fewer
            rows at a time.
        seeds: Images, or starting noises, that it takes of a prompt.
        steps: Steps of sampling that it watches from the first on, None for all.
    """

    title: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str] = ""
    sourcing: ClassVar[str] = ""
    families: ClassVar[frozenset[str]] = frozenset(FAMILIES)
    images: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    derives: ClassVar[bool] = False
    seeds: int = 1
    steps: int | None = 1

    @property
    def samples(self) -> bool:
        """Whether it needs guided sampling; predictions from pure noise are enough for others."""
        return self.steps != 1 or self.images or self.attends

    def check(self, family: str, guidance: float, *, compiled: bool = False) -> None:
        """Raises ModelError where a model does not suit, which can be told before its weights load.

        Args:
            family: Class of the pipeline.
            guidance: Scale of guidance while generating.
            compiled: Whether the UNet is compiled.
        """
        if family not in self.families:
            made_for = ", ".join(sorted(self.families))
            raise ModelError(f"{self.title} is made for {made_for}, given a {family}; leave this detector out for it")
        if self.samples and guidance <= 1:
            msg = f"{self.title} watches guided sampling, given model.guidance={guidance:g}"
            raise ModelError(f"{msg}; give model.guidance above 1, or leave this detector out")
        if compiled and (self.attends or self.derives):
            msg = f"{self.title} looks at attention or takes derivatives, which a compiled UNet does not allow"
            raise ModelError(f"{msg}; set model.compiled=false, or leave this detector out")

    def fits(self, model: Diffusion) -> None:  # noqa: B027 - most suit every model of their families
        """Looks whether settings suit a model, once it is there and before it makes any pass.

        Args:
            model: The model.

        Raises:
            NemoBenchError: They do not.
        """

    def layers(self, model: Diffusion, number: int) -> Collection[str]:
        """Cross-attention layers that it looks at in a step; see :func:`nemo_bench.diffusion.cross_attentions`.

        Args:
            model: The model.
            number: Number of the step, from 0.
        """
        return ()

    @abstractmethod
    def observe(self, view: View) -> Mapping[str, Tensor]:
        """Looks at a step of sampling.

        Args:
            view: The step.

        Returns:
            What is to be kept of it, by name, each (N, ...).
        """

    @abstractmethod
    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """Makes up its mind about a prompt.

        Args:
            model: The model; no pass is made any more.
            prompt: The prompt.
            seen: What :meth:`observe` kept, by step, each (seeds, ...).
            images: Images in [0, 1], (seeds, 3, height, width), where :attr:`images` is set.
        """


def check_finite(name: str, **numbers: float) -> None:
    """Raises ConfigError where a setting is infinite or no number."""
    for key, value in numbers.items():
        if not math.isfinite(value):
            raise ConfigError(f"{name} needs finite numbers, given detector.{key}={value}")


def check_counts(name: str, seeds: int, steps: int | None = None, *, least: int = 1) -> None:
    """Raises ConfigError where a number of seeds or steps is too small."""
    if seeds < least:
        raise ConfigError(f"{name} needs at least {least} seeds, given detector.seeds={seeds}")
    if steps is not None and steps < 1:
        raise ConfigError(f"{name} watches at least 1 step, given detector.steps={steps}; null watches all")
