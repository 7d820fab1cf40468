"""Unlearning: weights fitted to forget training images, by SISS and the losses that it is compared with."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import FiniteFloat
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import GRADIENT_MEMORY, Diffusion
from nemo_bench.errors import ConfigError, counted
from nemo_bench.methods.base import Fit, Setup
from nemo_bench.methods.fitted_weights import (
    FittedWeights,
    Pictures,
    finite_norm,
    kept_pictures,
    norm,
    reference_pictures,
)
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import batched, seed_of
from nemo_bench.records.ranges import Count, Index, Positive, Share

Loss = Literal["siss", "siss_no_is", "erase_diff", "neg_grad", "naive_deletion"]
TITLES: dict[Loss, str] = {
    "siss": "SISS",
    "siss_no_is": "SISS without importance sampling",
    "erase_diff": "EraseDiff",
    "neg_grad": "NegGrad",
    "naive_deletion": "Naive deletion",
}
#: Passes of a row in an update, forward and backward; SISS makes one forward and two backward.
PASSES: dict[Loss, int] = {"siss": 3, "siss_no_is": 4, "erase_diff": 4, "neg_grad": 2, "naive_deletion": 2}
LARGEST = 1.0  # Norm of the gradient of an update at most, over all weights.
TENTH = 0.1  # Advice of the public code on the norm that the forget gradient is scaled to.

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """What an update draws at random, on the CPU, one entry a row."""

    kept: list[int]  #: Place of the picture to keep among those.
    forgotten: list[int]  #: Place of the picture to forget.
    timesteps: list[int]
    noise: Tensor  #: Standard normal, shaped as latents.
    is_forgotten: Tensor  #: Whether the noisy picture of ``siss`` is made of the one to forget.
    uniform: Tensor  #: In [0, 1), shaped as latents, for ``erase_diff``.

    def rows(self, index: Sequence[int]) -> Draw:
        """Selects rows."""
        kept, forgotten, timesteps = (
            [values[row] for row in index] for values in (self.kept, self.forgotten, self.timesteps)
        )
        noise, is_forgotten, uniform = (values[list(index)] for values in (self.noise, self.is_forgotten, self.uniform))
        return Draw(kept, forgotten, timesteps, noise, is_forgotten, uniform)


@dataclass(eq=False)
class Unlearning(FittedWeights):
    """Fits all weights of the UNet so that it forgets training images (Alberti et al. 2025).

    The pictures x to keep and a to forget get the same timestep and noise n, m_x = g x + s n and m_a = g a + s n with
    g^2 = abar and s^2 = 1 - abar; e is the predicted noise. Losses are sums over elements, and means over rows:

    - ``siss``: one pass at m, which is m_a with probability ``forgetting`` (lambda), else m_x. To keep,
      w_x |e(m) - (m - g x) / s|^2, to forget w_a |e(m) - (m - g a) / s|^2, with w_x = 1 / ((1 - lambda) + lambda
      exp(d_x - d_a)), d_x = |m - g x|^2 / 2 s^2 and so on. Of many elements one weight is 0 and the other 1 / lambda
      or 1 / (1 - lambda).
    - ``siss_no_is``: |e(m_x) - n|^2 and |e(m_a) - n|^2, two passes.
    - ``erase_diff``: the same, but to forget |e(m_a) - u|^2, u uniform in [0, 1).
    - ``neg_grad``: -``superfactor`` |e(m_a) - n|^2 alone. It diverges with more updates.
    - ``naive_deletion``: |e(m_x) - n|^2 alone.

    The gradient is G_x - c G_a / |G_a| for SISS, with c by ``scaling_norm``, and G_x + max(eta - <G_x, G_a> / |G_a|^2,
    0) G_a for EraseDiff. It is clipped to norm 1, and AdamW takes ``updates`` steps of ``batch`` rows.

    An update of SISS that drew no picture to forget keeps alone. All reference images of the memorized prompts are
    forgotten by one model; the source fits one for each prompt. Latents are the autoencoder's means, and pictures are
    not flipped; the source samples latents, and flips at random.
    Pictures to keep are those of ``keep``, or images that the model generates for its prompts; the source keeps other
    images of the memorized prompt. Each picture is conditioned on its own prompt, and timesteps are of the whole range;
    the public scripts condition all on the memorized prompt and take timestep 999 alone, where only the first step of
    sampling changes. The weights are fitted once for all images of a cell, by the first process, and kept in
    ``<root>/fitted``, with what the fit took.

    The training images are seen, so results are not to be ranked beside mitigations that see prompts alone.
    """

    title = "Unlearning"
    summary = "weights fitted to forget the training images: SISS, EraseDiff, NegGrad, naive deletion"
    sourcing = "public code and abstract"
    limits = "its losses are weighed by the noise levels of Stable Diffusion, and flow matching mixes by others"
    citation = cite("alberti2025data")

    loss: Loss = "siss"
    forgetting: Share = 0.5  #: lambda.
    #: c, the norm that the forget gradient of SISS is scaled to. Published: 750 for Stable Diffusion; None is a tenth
    #: of the keep gradient's norm at each update, as the public code advises.
    scaling_norm: Positive | None = None
    eta: FiniteFloat = 0.01
    superfactor: Positive = 1.0
    updates: Index = 35
    rate: Positive = 1e-5
    batch: Count = 16
    #: Smallest timestep that is drawn; 999 is that of the public scripts. Those at which latents are noise alone (zero
    #: terminal SNR) are never drawn.
    earliest: Index = 0
    conditioning: Literal["own", "memorized"] = "own"  #: Prompt of pictures to keep.
    seed: Index = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "siss" and self.forgetting == 1 and self.scaling_norm is None:
            raise ConfigError(
                "forgetting=1 leaves nothing to keep, by whose gradient scaling_norm=null scales; "
                "give scaling_norm, or forgetting below 1"
            )
        self.title = f"{TITLES[self.loss]} (fitted on training images)"

    @override
    def fit(self, model: Diffusion, setup: Setup) -> Fit:
        self.batch_size = setup.batch_size
        kept, forgotten = self.sides(setup.prompts)
        memorized = sum(prompt.kind is not None for prompt in setup.prompts)
        keep, forget = kept_pictures(model, kept, setup.batch_size), reference_pictures(model, forgotten)
        log.info(
            "%s: %s of %s to forget, %d without any; %s of %s to keep",
            self.title,
            counted(len(forget.latents), "picture"),
            counted(memorized, "memorized prompt"),
            memorized - len(forgotten),
            counted(len(keep.latents), "picture"),
            counted(len(kept), "prompt"),
        )
        return UnlearningFit(self, model, keep, forget)

    @override
    def least_passes(self, prompts: Sequence[Prompt], image: int) -> int:
        return self.kept_passes(prompts, image) + self.updates * self.batch * PASSES[self.loss]


class UnlearningFit(Fit):
    """The updates of one fit; each is drawn by its number alone, so that a resumed fit is the same."""

    def __init__(self, method: Unlearning, model: Diffusion, kept: Pictures, forgotten: Pictures) -> None:
        super().__init__(model.network, method.updates, method.rate)
        self.method = method
        self.model = model
        self.kept = kept
        self.forgotten = forgotten
        self.timesteps = model.noisy_timesteps(min(method.earliest, model.training_timesteps - 1))
        if not self.timesteps:
            raise ConfigError(
                f"{method.title}, given earliest={method.earliest}: from there on latents of this model are noise "
                "alone (its scheduler has zero terminal SNR), with no picture in them to forget; lower method.earliest"
            )

    @override
    def gradients(self, number: int) -> list[Tensor]:
        method, weights = self.method, [*self.network.parameters()]
        generator = torch.Generator().manual_seed(seed_of(["unlearning", method.seed, number]))
        keep, forget = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
        drawn = self.draw(method.batch, generator)  # all rows at once: their split must not change what is drawn
        for rows in batched(range(method.batch), max(1, method.batch_size // GRADIENT_MEMORY)):
            losses = self.losses(drawn.rows(rows))
            for total, loss in zip((keep, forget), losses, strict=True):
                if loss is not None:
                    found = torch.autograd.grad(loss / method.batch, weights, retain_graph=True)
                    for one, other in zip(total, found, strict=True):
                        one += other
        # Rows to keep weigh in the forget loss by next to nothing, which scaling would blow up.
        keeps = method.loss == "siss" and not drawn.is_forgotten.any()
        combined = keep if keeps else combine(method, keep, forget)
        length = finite_norm(combined, f"update {number + 1} of {self.updates}")
        return [gradient * (LARGEST / length) for gradient in combined] if length > LARGEST else combined

    def draw(self, rows: int, generator: torch.Generator) -> Draw:
        """Draws some rows."""
        kept, forgotten, levels = (
            torch.randint(len(choices), (rows,), generator=generator).tolist()
            for choices in (self.kept.latents, self.forgotten.latents, self.timesteps)
        )
        shape = (rows, *self.kept.latents.shape[1:])
        return Draw(
            kept=kept,
            forgotten=forgotten,
            timesteps=[self.timesteps[level] for level in levels],
            noise=torch.randn(shape, generator=generator),
            is_forgotten=torch.rand(rows, generator=generator) < self.method.forgetting,
            uniform=torch.rand(shape, generator=generator),
        )

    def losses(self, drawn: Draw) -> tuple[Tensor | None, Tensor | None]:
        """Keep and forget loss of some drawn rows, summed over them; None for a loss without that side."""
        method, model, timesteps = self.method, self.model, drawn.timesteps
        keeping, forgetting = self.kept.rows(drawn.kept), self.forgotten.rows(drawn.forgotten)
        x, a, own_a = keeping.latents, forgetting.latents, forgetting.text
        own_x = own_a if method.conditioning == "memorized" else keeping.text
        signals = x.new_tensor([model.signal(timestep) for timestep in timesteps])[:, None, None, None]
        signal, sigma = signals.sqrt(), (1 - signals).sqrt()
        noise = drawn.noise.to(x)
        noisy_x, noisy_a = signal * x + sigma * noise, signal * a + sigma * noise
        if method.loss == "siss":
            is_forgotten = drawn.is_forgotten.to(x.device)
            noisy = torch.where(is_forgotten[:, None, None, None], noisy_a, noisy_x)
            both = own_x.followed_by(own_a)
            text = both.rows([row + len(x) * is_a for row, is_a in enumerate(drawn.is_forgotten.long().tolist())])
            predicted = model.predict_noises(noisy, timesteps, text)
            to_x, to_a = (noisy - signal * x) / sigma, (noisy - signal * a) / sigma
            weight_x, weight_a = importance(squares(to_x) / 2, squares(to_a) / 2, method.forgetting)
            return (weight_x * squares(predicted - to_x)).sum(), (weight_a * squares(predicted - to_a)).sum()
        keep = (
            None
            if method.loss == "neg_grad"
            else squares(model.predict_noises(noisy_x, timesteps, own_x) - noise).sum()
        )
        if method.loss == "naive_deletion":
            return keep, None
        target = drawn.uniform.to(x) if method.loss == "erase_diff" else noise
        return keep, squares(model.predict_noises(noisy_a, timesteps, own_a) - target).sum()


def importance(distance_x: Tensor, distance_a: Tensor, forgetting: float) -> tuple[Tensor, Tensor]:
    """Importance weights of rows, from their distances d_x and d_a; computed from logarithms, which can't overflow."""
    keep, forget = (math.log(share) if share else -math.inf for share in (1 - forgetting, forgetting))
    further = distance_x - distance_a
    weight_x = torch.logaddexp(torch.full_like(further, keep), forget + further)
    weight_a = torch.logaddexp(keep - further, torch.full_like(further, forget))
    return (-weight_x).exp(), (-weight_a).exp()


def combine(method: Unlearning, keep: Sequence[Tensor], forget: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of an update from those of both losses, by weight."""
    if method.loss == "naive_deletion":
        return [*keep]
    if method.loss == "neg_grad":
        return [-method.superfactor * gradient for gradient in forget]
    length = norm(forget)
    if not length:
        return [*keep]
    if method.loss == "erase_diff":
        inner = sum(float((one * other).sum()) for one, other in zip(keep, forget, strict=True))
        factor = max(method.eta - inner / length**2, 0.0)
    else:
        factor = -(TENTH * norm(keep) if method.scaling_norm is None else method.scaling_norm) / length
    return [one + factor * other for one, other in zip(keep, forget, strict=True)]


def squares(values: Tensor) -> Tensor:
    """Sum of squares of each row, (N,)."""
    return values.square().flatten(1).sum(1)
