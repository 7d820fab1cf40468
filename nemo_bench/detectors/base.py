"""The base of all detectors, and the view of a sampling step that they observe."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_bench.diffusion import UNETS, Conditioning, Diffusion, Step
from nemo_bench.errors import ModelError
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Checked

Observed = Sequence[Mapping[str, Tensor]]
"""The values that a detector observed for a prompt: by step, then by name, each (seeds, ...)."""


def now(model: Diffusion) -> float:
    """Seconds on a clock, after all work of the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


@dataclass(frozen=True)
class DetectorScore:
    """The score of a prompt."""

    score: float  #: Larger for memorized prompts.
    #: Values that explain the score, as plain data for the records.
    details: Mapping[str, Any] = field(default_factory=dict)
    picture: Tensor | None = None  #: An illustration, (3, height, width) in [0, 1], or None.
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  #: Kept in a file beside the record.
    failed: str = ""  #: Why the score is not finite, empty where it is.


@dataclass(eq=False, kw_only=True)
class View:
    """One step of sampling as a detector sees it, before noise is removed; N rows, one an image."""

    model: Diffusion
    text: Conditioning
    latents: Tensor  #: Noisy latents, (N, channels, height, width).
    timestep: float  #: See :attr:`nemo_bench.diffusion.Step.timestep`.
    number: int = 0  #: Number of the step, from 0, the noisiest.
    seeds: Sequence[int]  #: Seed index of each row.
    lengths: Sequence[int]  #: Tokens of each row's prompt from begin to end token, without padding.
    maps: Mapping[str, Tensor] = field(default_factory=dict)  #: Attention by layer, see :meth:`attention`.
    #: ``"conditional"`` and ``"unconditional"`` predictions; those missing are made when they are first read.
    noises: dict[str, Tensor] = field(default_factory=dict)
    passes: int = 0  #: Rows of the predictions read so far.
    seconds: float = 0.0  #: Time that predicting took.
    whole: View | None = None  #: The view of all rows, whose predictions this one shares, or None.
    index: Sequence[int] = ()  #: Which rows of it these are.

    def rows(self, index: Sequence[int]) -> View:
        """The view of some rows, which shares the predictions of this one."""
        return View(
            model=self.model,
            text=self.text.rows(index),
            latents=self.latents[index],
            timestep=self.timestep,
            number=self.number,
            seeds=[self.seeds[row] for row in index],
            lengths=[self.lengths[row] for row in index],
            whole=self,
            index=index,
        )

    @property
    def conditional(self) -> Tensor:
        """Noise predicted for the prompts, float32, (N, channels, height, width)."""
        return self._noise("conditional")

    @property
    def unconditional(self) -> Tensor:
        """Noise predicted for the empty prompt, float32, (N, channels, height, width)."""
        return self._noise("unconditional")

    @property
    def step(self) -> Step:
        """The step with both predictions, their difference and its magnitude."""
        scale = self.model.guidance
        return Step(self.number, self.timestep, scale, self.latents, self.unconditional, self.conditional)

    def attention(self, layer: str) -> Tensor:
        """Cross-attention of a layer, the mean over heads, (N, positions, tokens); sums over tokens are 1."""
        return self.maps[layer] if self.whole is None else self.whole.maps[layer][self.index]

    def _noise(self, half: str) -> Tensor:
        if half not in self.noises:
            self.noises[half] = self._predict(half) if self.whole is None else self.whole._noise(half)[self.index]
            self.passes += len(self.latents)
        return self.noises[half]

    def _predict(self, half: str) -> Tensor:
        start = now(self.model)
        text = self.text if half == "conditional" else self.model.unconditional(len(self.latents))
        noise = self.model.predict_noise(self.latents, self.timestep, text)
        self.seconds += now(self.model) - start
        return noise


class Detector(Checked, ABC):
    """Gives each prompt a score, larger for prompts that the model has memorized.

    Constructors raise :class:`ConfigError` where an argument is out of the range in its annotation.
    """

    title: ClassVar[str]  #: Name in tables.
    summary: ClassVar[str]  #: One line for ``nemo-bench ls``.
    citation: ClassVar[str] = ""  #: BibTeX of the source, empty for one of your own.
    sourcing: ClassVar[str] = ""  #: Which parts of the source were available: paper, public code.
    families: ClassVar[frozenset[str]] = UNETS  #: Classes of the pipelines that it supports.
    #: Why it does not support the others.
    limits: ClassVar[str] = "published for UNets of Stable Diffusion, and not carried over to transformers"
    images: ClassVar[bool] = False  #: Whether it needs finished images.
    attends: ClassVar[bool] = False  #: Whether it needs cross-attention.
    #: Whether it takes derivatives of the UNet, which must then not be compiled; it observes fewer rows at a time.
    derives: ClassVar[bool] = False
    seeds: int = 1  #: Images, or starting noises, of a prompt.
    steps: int | None = 1  #: Steps of sampling that it observes, from the first; None for all.

    @property
    def samples(self) -> bool:
        """Whether it needs guided sampling; otherwise predictions from pure noise are enough."""
        return self.steps != 1 or self.images or self.attends

    def check(self, family: str, guidance: float, *, compiled: bool = False) -> None:
        """Raises ModelError, before weights load, where the class of the pipeline, guidance or compiling don't suit."""
        if family not in self.families:
            made_for = ", ".join(sorted(self.families))
            msg = f"{self.title} is made for {made_for} ({self.limits}), given a {family}"
            raise ModelError(f"{msg}; leave this detector out for it")
        if self.samples and guidance <= 1:
            msg = f"{self.title} watches guided sampling, given model.guidance={guidance:g}"
            raise ModelError(f"{msg}; give model.guidance above 1, or leave this detector out")
        if compiled and (self.attends or self.derives):
            msg = f"{self.title} looks at attention or takes derivatives, which a compiled UNet does not allow"
            raise ModelError(f"{msg}; set model.compiled=false, or leave this detector out")

    def check_model(self, model: Diffusion) -> None:
        """Raises NemoBenchError, before any pass, where settings do not suit a loaded model."""

    def layers(self, model: Diffusion, number: int) -> Collection[str]:
        """Layers of :func:`nemo_bench.diffusion.cross_attentions` whose attention it needs in a step, from 0."""
        return ()

    @abstractmethod
    def observe(self, view: View) -> Mapping[str, Tensor]:
        """Computes the values of a step that the score needs, by name, each (N, ...)."""

    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        """Computes the score of a prompt from results of :meth:`observe`, by default their mean; makes no pass.

        Images in [0, 1], (seeds, 3, height, width), are given where :attr:`images` is set.
        """
        (name,) = observed[0]
        return DetectorScore(float(torch.stack([step[name] for step in observed]).mean()))
