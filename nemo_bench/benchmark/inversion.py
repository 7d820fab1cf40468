"""Inversion of pictures: noise and tokens that give a picture back, as close to random as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.optim import Adam

from nemo_bench.diffusion import GRADIENT_MEMORY, Conditioning, Diffusion
from nemo_bench.errors import NotFiniteError
from nemo_bench.records.io import batched

FAMILIES = frozenset({"StableDiffusionPipeline"})
"""Classes of pipelines with the one text encoder whose tokens are searched."""
STEPS, RATE, SAMPLES, TEMPERATURE, CHECK, NOISES = 2000, 0.1, 16, 2.0, 50, 8
"""Published: steps of Adam at most, its rate, draws a step, temperature of tokens, steps between two checks, and images
of a check at each guidance."""
GUIDANCES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
RISE, PROGRESS, WINDOW = 1e-3, 1e-3, 100
"""Published: what is added to the weight of the divergence, the least fall of the loss between two checks at which that
is done, and the number of last steps whose mean loss is compared."""

Replicates = Callable[[Tensor], float]
"""Share of images, (N, 3, height, width), that replicate the picture."""


@dataclass(frozen=True)
class Inverted:
    """The end of an inversion."""

    mean: Tensor  #: Of the noise, (channels, height, width).
    log_variance: Tensor  #: Of the noise, likewise.
    logits: Tensor  #: Of tokens, (positions, vocabulary).
    losses: Tensor  #: Denoising loss of each step.
    divergence: float  #: Of the noise from a standard normal one; the measure of InvMM where the picture was reached.
    reached: bool  #: Whether all images of a check replicated the picture.
    guidance: float  #: Guidance of :attr:`images`.
    images: Tensor  #: Those of the last check, at the guidance at which most replicate, (noises, 3, height, width).


@dataclass
class DivergenceWeight:
    """Weight of the divergence in the loss: it rises while the denoising loss falls, and is halved once that stalls."""

    check: int  #: Steps between two looks at the loss.
    value: float = 1.0
    losses: list[float] = field(default_factory=list)
    before: float | None = None  #: Mean loss at the last look.

    def update(self, loss: float) -> None:
        """Takes the denoising loss of a step."""
        self.losses.append(loss)
        is_stalled = False
        if len(self.losses) % self.check == 0:
            mean = fmean(self.losses[-WINDOW:])
            is_stalled = self.before is not None and self.before - mean < PROGRESS
            self.before = mean
        self.value = self.value / 2 if is_stalled else self.value + RISE


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a normal distribution from the standard normal one, a mean over elements."""
    return (mean.square() + log_variance.exp() - log_variance - 1).mean() / 2


def soft_texts(model: Diffusion, tokens: Tensor) -> Conditioning:
    """Encodes mixtures of tokens at all positions but those of the begin token and the last token of the empty prompt.

    Args:
        model: A model of :data:`FAMILIES`.
        tokens: Probabilities of tokens, (N, positions, vocabulary).
    """
    words: nn.Embedding = model.pipeline.text_encoder.get_input_embeddings()

    def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1], tokens.to(output) @ words.weight, output[:, -1:]], 1)

    hook = words.register_forward_hook(replace)
    try:
        return model.family.encode(model.pipeline, [""] * len(tokens), model.device)
    finally:
        hook.remove()


@dataclass
class Inversion:
    """An inversion of one picture (InvMM: Ma et al. 2025), under whatever is applied to the network.

    A normal distribution of noise n and a distribution of tokens are fitted by Adam so that the network denoises n at
    any timestep to the picture z. The loss is the mean squared error of the predicted clean latents, without guidance,
    plus a weight times the divergence of the noise from the standard normal distribution. At every check the picture is
    sampled from new noise of the distribution, with one draw of tokens, at each guidance; where all images of one
    guidance replicate it, that is repeated once with new draws, and the inversion ends. The closer to normal the noise
    is then, the more the picture is memorized.

    Taken from the public code; the paper was not read. Ours: the repeated check; the run's own memorization rate in
    place of SSCD at 0.5; as many steps of sampling as the run has, in place of 50; timesteps at which latents are noise
    alone are not drawn; where loss is compared between checks it is the denoising loss.
    """

    model: Diffusion
    target: Tensor  #: Clean latents of the picture, float32, (channels, height, width).
    replicates: Replicates
    seed: int  #: Of all that is drawn.
    batch_size: int  #: Rows in a pass without gradients at most.
    steps: int = STEPS
    rate: float = RATE
    samples: int = SAMPLES
    temperature: float = TEMPERATURE
    check: int = CHECK
    guidances: Sequence[float] = GUIDANCES
    noises: int = NOISES

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.timesteps = self.model.noisy_timesteps()

    def run(self) -> Inverted:
        """Inverts the picture.

        Raises:
            NotFiniteError: The loss is not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            # Copied, since what was made in inference mode takes no part in gradients.
            self.target = self.target.clone().float()
            zeros = torch.zeros_like(self.target)
            self.mean, self.log_variance = zeros.clone().requires_grad_(), zeros.clone().requires_grad_()
            words = self.model.pipeline.text_encoder.get_input_embeddings().weight
            positions = self.model.unconditional(1).text.shape[1] - 2
            self.logits = torch.zeros(positions, len(words), device=words.device).requires_grad_()
            return self._run()

    def _run(self) -> Inverted:
        optimizer = Adam([self.mean, self.log_variance, self.logits], lr=self.rate)
        weight = DivergenceWeight(self.check)
        reached = False
        for step in range(1, self.steps + 1):
            optimizer.zero_grad()
            loss = self._denoise()
            (weight.value * divergence(self.mean, self.log_variance)).backward()
            optimizer.step()
            if not math.isfinite(loss):
                raise NotFiniteError(f"the loss of step {step} of an inversion is not finite")
            weight.update(loss)
            if step % self.check == 0 or step == self.steps:
                share, guidance, images = self._sample(self.guidances)
                # New draws may disagree with those that happened to replicate the picture.
                reached = share == 1 and self._sample([guidance])[0] == 1
                if reached:
                    break
        with torch.no_grad():
            found = float(divergence(self.mean, self.log_variance))
        return Inverted(
            mean=self.mean.detach(),
            log_variance=self.log_variance.detach(),
            logits=self.logits.detach(),
            losses=torch.tensor(weight.losses),
            divergence=found,
            reached=reached,
            guidance=guidance,
            images=images,
        )

    def _denoise(self) -> float:
        """The denoising loss at new draws; its gradients are added to those of what is fitted."""
        model, count = self.model, self.samples
        normal = torch.randn((count, *self.target.shape), generator=self.generator)
        gumbel = self._gumbel(count)
        levels = torch.randint(len(self.timesteps), (count,), generator=self.generator).tolist()
        total = 0.0
        for part in batched(range(count), max(1, self.batch_size // GRADIENT_MEMORY)):
            rows = list(part)
            timesteps = [self.timesteps[levels[row]] for row in rows]
            text = soft_texts(model, self._tokens(gumbel[rows]))
            signals = self.target.new_tensor([model.signal(t) for t in timesteps])[:, None, None, None]
            signal, sigma = signals.sqrt(), (1 - signals).sqrt()
            noisy = signal * self.target + sigma * self._noise(normal[rows])
            clean = (noisy - sigma * model.predict_noises(noisy, timesteps, text)) / signal
            loss = (clean - self.target).square().flatten(1).mean(1).sum() / count
            loss.backward()
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def _sample(self, guidances: Sequence[float]) -> tuple[float, float, Tensor]:
        """Most images that replicate the picture, as share, at any guidance; that guidance, and its images."""
        text = soft_texts(self.model, self._tokens(self._gumbel(1)))
        normal = torch.randn((self.noises, *self.target.shape), generator=self.generator)
        noise = self._noise(normal).to(self.model.dtype)
        best = (-1.0, guidances[0], noise)
        for guidance in guidances:
            with guided(self.model, guidance):
                parts = batched(range(self.noises), max(1, self.batch_size))
                images = torch.cat([self.model.generate(text.rows([0] * len(p)), noise[list(p)]) for p in parts])
                found = (self.replicates(images), guidance, images)
            best = max(best, found, key=lambda of: of[0])
            if best[0] == 1:
                break
        return best

    def _noise(self, normal: Tensor) -> Tensor:
        return self.mean + (self.log_variance / 2).exp() * normal.to(self.mean)

    def _gumbel(self, count: int) -> Tensor:
        return -torch.empty(count, *self.logits.shape).exponential_(generator=self.generator).log()

    def _tokens(self, gumbel: Tensor) -> Tensor:
        return ((self.logits + gumbel.to(self.logits)) / self.temperature).softmax(-1)


@contextmanager
def guided(model: Diffusion, scale: float) -> Iterator[None]:
    """Generates with a guidance scale inside the context."""
    own = model.guidance
    model.guidance = scale
    try:
        yield
    finally:
        model.guidance = own
