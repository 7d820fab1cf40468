"""Schedules that models sample by, their conversions of predictions, and checks before weights load."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion.noise import clean_latents
from nemo_bench.errors import ModelError, NotFiniteError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

NO_SIGNAL = 1e-6
"""Share of the signal in the variance of latents below which they are pure noise."""
LEAST_SIGNAL = 0.07
"""Weight of the clean latents at Stable Diffusion's first step; flow matching begins without any."""
NOISE_STEPS = 50
"""DDIM steps that the timestep of noise differences refers to (Hintersdorf et al. 2024)."""
PUBLISHED_TIMESTEPS = range(981, 0, -20)
"""The 50 DDIM timesteps of Stable Diffusion, which published settings refer to."""
_PREDICTIONS = ("epsilon", "v_prediction")
_BETAS = ("beta_start", "beta_schedule", "trained_betas")
# Settings of Stable Diffusion where a shipped scheduler has none; the defaults of DDIM are made for pixels.
_DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}


class Schedule(ABC):
    """Noise levels of a model, the steps between them, and what its network predicts there.

    What methods and detectors compare, and call noise, is :attr:`quantity`: noise, or the velocity of flow matching.
    """

    quantity: ClassVar[str]  #: ``"noise"`` or ``"velocity"``.
    scheduler: Any  #: The diffusers scheduler, of which :meth:`with_steps` makes copies.

    @abstractmethod
    def with_steps(self, steps: int, device: torch.device | str | None = None) -> Any:
        """A copy of the scheduler with a number of steps."""

    def timesteps(self, steps: int) -> list[Any]:
        """Timesteps of a number of steps, the noisiest first."""
        timesteps: list[Any] = self.with_steps(steps).timesteps.tolist()
        return timesteps

    @property
    def training_timesteps(self) -> int:
        """Number of noise levels in training."""
        return int(self.scheduler.config.num_train_timesteps)

    @abstractmethod
    def like(self, timestep: float) -> float:
        """The timestep whose ratio of signal to noise is that of a timestep of Stable Diffusion; 1000 is all noise."""

    def published(self, timestep: float) -> float:
        """The timestep of Stable Diffusion that a timestep has the ratio of signal to noise of: undoes :meth:`like`."""
        return int(np.abs(_published_signals() - self.signal(timestep)).argmin())

    @property
    def noisiest(self) -> float:
        """The timestep of most noise."""
        return self.training_timesteps - 1

    def timestep(self, step: int) -> float:
        """Timestep of one of 50 steps: the model's own first one, and from there on those like Stable Diffusion's."""
        first: float = self.timesteps(NOISE_STEPS)[0]
        return first if step == 0 else self.like(PUBLISHED_TIMESTEPS[step])

    def difference_timestep(self, step: int) -> float:
        """Timestep of noise differences for one of 50 steps; at the noisiest, latents still hold some signal."""
        return self.like(PUBLISHED_TIMESTEPS[step])

    def noised(self, noise: Tensor, timestep: float) -> Tensor:
        """Standard normal noise as latents of a timestep."""
        return noise

    @abstractmethod
    def signal(self, timestep: float) -> float:
        """Share of the signal in the variance of a latent at a timestep; the rest is noise."""

    @abstractmethod
    def noise_weights(self, timestep: float) -> tuple[float, float]:
        """Weights of output and latents whose sum is the :attr:`quantity`."""

    @abstractmethod
    def mixture(self, timestep: float) -> tuple[float, float]:
        """Weights of clean latents and noise whose sum is the latents of a timestep."""

    def clean(self, predicted: Tensor, timestep: float, latents: Tensor) -> Tensor:
        """The clean latents that a predicted :attr:`quantity` leads to, float32."""
        return clean_latents(latents, predicted, self.signal(timestep))

    def noise_of(self, predicted: Tensor, timestep: float, latents: Tensor | None = None) -> Tensor:
        """The noise that a predicted :attr:`quantity` says is in latents; without them, of a difference of two."""
        return predicted

    def change(self, noise: Tensor, timestep: float) -> Tensor:
        """The change of a predicted :attr:`quantity` that changes the predicted noise by this much."""
        return noise

    @abstractmethod
    def difference(self, predicted: Tensor, timestep: float, latents: Tensor) -> Tensor:
        """The noise difference of a predicted :attr:`quantity`, float32, before it is scaled (see families)."""

    @abstractmethod
    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents with noise, as in training."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The output that training asks for."""


class VariancePreserving(Schedule):
    """DDIM in the noise schedule of a shipped scheduler; the network predicts noise or velocity.

    Args:
        config: Configuration of the shipped scheduler, of any class.
        own: Whether published timesteps are meant as they are, as for Stable Diffusion and what is shaped like it.
    """

    quantity = "noise"

    def __init__(self, config: Mapping[str, Any], *, own: bool = True) -> None:
        self.scheduler = ddim(config)
        self.own = own

    @override
    def with_steps(self, steps: int, device: torch.device | str | None = None) -> DDIMScheduler:
        scheduler = copy.copy(self.scheduler)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    @override
    def signal(self, timestep: float) -> float:
        return float(self.scheduler.alphas_cumprod[int(timestep)])

    @override
    def like(self, timestep: float) -> float:
        if self.own:
            return timestep
        return int((self.scheduler.alphas_cumprod - _published_signal(timestep)).abs().argmin())

    @override
    def timestep(self, step: int) -> float:
        return int(self.timesteps(NOISE_STEPS)[step]) if self.own else super().timestep(step)

    @override
    def published(self, timestep: float) -> float:
        return timestep if self.own else super().published(timestep)

    @override
    def mixture(self, timestep: float) -> tuple[float, float]:
        signal = self.signal(timestep)
        return signal**0.5, (1 - signal) ** 0.5

    @override
    def difference_timestep(self, step: int) -> float:
        return self.timestep(step) if self.own else super().difference_timestep(step)

    @override
    def difference(self, predicted: Tensor, timestep: float, latents: Tensor) -> Tensor:
        return predicted - latents.float()

    @override
    def noise_weights(self, timestep: float) -> tuple[float, float]:
        # Salimans and Ho 2022
        if not self._predicts_velocity:
            return 1.0, 0.0
        alpha = self.signal(timestep)
        if alpha < NO_SIGNAL:
            raise NotFiniteError(
                f"at timestep {timestep} latents of this model are noise alone (its scheduler has zero terminal SNR), "
                "and no predicted noise follows from a velocity there; set rescale_betas_zero_snr=false and "
                "timestep_spacing=leading in the scheduler's configuration"
            )
        return alpha**0.5, (1 - alpha) ** 0.5

    @property
    def _predicts_velocity(self) -> bool:
        kind = self.scheduler.config.prediction_type
        if kind not in _PREDICTIONS:
            raise ModelError(f"prediction type '{kind}' is not supported; use a model with epsilon or v_prediction")
        return bool(kind == "v_prediction")

    @override
    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy: Tensor = self.scheduler.add_noise(clean, noise, timesteps)
        return noisy

    @override
    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        velocity: Tensor = self.scheduler.get_velocity(clean, noise, timesteps)
        return velocity if self._predicts_velocity else noise


class Flow(Schedule):
    """Euler's method for flow matching: latents are (1 - s) x0 + s noise, and the network predicts noise - x0.

    It is DDIM on that path. Timesteps are 1000 s. At s = 1 latents hold nothing but noise: there the predicted noise is
    the latents whatever the prompt, so that velocities are compared; and a good network predicts the mean picture of
    the prompt, on which all seeds agree, so that noise differences are taken where Stable Diffusion's signal is.

    Args:
        config: Configuration of the shipped scheduler.
        positions: Image positions of the transformer, by which a dynamic shift is chosen.
        linear: Whether the pipeline asks for levels evenly spaced from 1 before they are shifted, as FLUX does.
    """

    quantity = "velocity"

    def __init__(self, config: Mapping[str, Any], positions: int, *, linear: bool = False) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        self.positions = positions
        self.linear = linear

    @override
    def with_steps(self, steps: int, device: torch.device | str | None = None) -> FlowMatchEulerDiscreteScheduler:
        scheduler = copy.copy(self.scheduler)
        options: dict[str, Any] = {}
        if self.linear:
            options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        if scheduler.config.use_dynamic_shifting:
            options["mu"] = self._shift
        scheduler.set_timesteps(steps, device=device, **options)
        return scheduler

    @property
    def _shift(self) -> float:
        """Shift for the number of positions, linear between those of two pictures' numbers."""
        config = self.scheduler.config
        few, many = config.base_image_seq_len, config.max_image_seq_len
        slope = (config.max_shift - config.base_shift) / (many - few)
        shift: float = self.positions * slope + (config.base_shift - slope * few)
        return shift

    @override
    def like(self, timestep: float) -> float:
        alpha = _published_signal(timestep)
        return self.training_timesteps / (1 + math.sqrt(alpha / (1 - alpha)))

    @property
    @override
    def noisiest(self) -> float:
        return self.training_timesteps

    @override
    def noised(self, noise: Tensor, timestep: float) -> Tensor:
        return noise * (timestep / self.training_timesteps)

    @override
    def mixture(self, timestep: float) -> tuple[float, float]:
        share = timestep / self.training_timesteps
        return 1 - share, share

    @override
    def clean(self, predicted: Tensor, timestep: float, latents: Tensor) -> Tensor:
        return latents.float() - self.mixture(timestep)[1] * predicted

    @override
    def noise_of(self, predicted: Tensor, timestep: float, latents: Tensor | None = None) -> Tensor:
        noise = self.mixture(timestep)[0] * predicted
        return noise if latents is None else latents.float() + noise

    @override
    def change(self, noise: Tensor, timestep: float) -> Tensor:
        return noise / max(self.mixture(timestep)[0], LEAST_SIGNAL)

    @override
    def signal(self, timestep: float) -> float:
        share = timestep / self.training_timesteps
        return (1 - share) ** 2 / ((1 - share) ** 2 + share**2)

    @override
    def noise_weights(self, timestep: float) -> tuple[float, float]:
        return 1.0, 0.0

    @override
    def difference(self, predicted: Tensor, timestep: float, latents: Tensor) -> Tensor:
        # The negated clean prediction: what predicted minus starting noise is, but for a few per cent of noise.
        return timestep / self.training_timesteps * predicted - latents.float()

    @override
    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        share = (timesteps / self.training_timesteps)[:, None, None, None]
        return (1 - share) * clean + share * noise

    @override
    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - clean


@cache
def _published_signals() -> NDArray[np.float64]:
    """Share of the signal in the variance at the timesteps of Stable Diffusion, 0 to 999."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


def _published_signal(timestep: float) -> float:
    signals = _published_signals()
    return float(signals[int(timestep)]) if timestep < len(signals) else 0.0


def ddim(shipped: Mapping[str, Any]) -> DDIMScheduler:
    """The DDIM scheduler of a model, with noise schedule, prediction type and spacing of its shipped scheduler."""
    from diffusers import DDIMScheduler

    unset = {*shipped.get("_use_default_values", ()), "_use_default_values"}
    return DDIMScheduler.from_config({**_DDIM, **{k: v for k, v in shipped.items() if k not in unset}})


def check_schedule(shipped: Mapping[str, Any], steps: int, *, predicts: bool, where: str) -> None:
    """Checks that DDIM can sample under a noise schedule with finite latents in every step.

    Args:
        shipped: Configuration of the shipped scheduler, of any class.
        steps: DDIM steps of a generation.
        predicts: Whether predicted noise is needed besides images; a velocity gives none where latents are pure noise.
        where: Where the model is, for the message.

    Raises:
        ModelError: The schedule has no betas, as in flow matching and Karras et al. (2022); the model predicts neither
            noise nor velocity; there are too many steps; or noise is predicted where latents are pure noise (zero
            terminal SNR, Lin et al. 2023), where DDIM divides by the signal that is left.
    """

    def refusal(problem: str, hint: str) -> ModelError:
        return ModelError(f"model '{where}': {problem}; {hint} (scheduler/scheduler_config.json)")

    name = str(shipped.get("_class_name", "the scheduler"))
    if shipped.get("use_flow_sigmas") or not any(key in shipped for key in _BETAS):
        hint = "give a model that was trained under one, with its scheduler, such as DDIMScheduler"
        raise refusal(f"{name} has no noise schedule of betas, which DDIM needs", hint)
    prediction = shipped.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise refusal(f"prediction_type={prediction} is not supported", "give a model with epsilon or v_prediction")
    try:
        scheduler = ddim(shipped)
        timesteps = []
        for count in (steps, NOISE_STEPS):
            scheduler.set_timesteps(count)
            timesteps += scheduler.timesteps.tolist()
        signal = scheduler.alphas_cumprod[timesteps]
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        hint = f"expected settings of DDIMScheduler that allow model.steps={steps}"
        raise refusal(f"its schedule can't be used ({error})", hint) from error
    if not scheduler.alphas_cumprod.isfinite().all():
        raise refusal("its betas give no finite schedule", "mend beta_start, beta_end or trained_betas")
    if signal.min() < NO_SIGNAL and (predicts or prediction == "epsilon"):
        first = timesteps[int(signal.argmin())]
        reason = "from which no noise follows" if prediction == "v_prediction" else "and the network predicts noise"
        problem = f"at timestep {first} latents are noise alone (zero terminal SNR), {reason}"
        raise refusal(problem, "set rescale_betas_zero_snr=false, or timestep_spacing=leading")


def check_flow(shipped: Mapping[str, Any], *, where: str) -> None:
    """Raises ModelError unless a shipped scheduler is that of flow matching by Euler's method, or can be sampled so."""
    name = str(shipped.get("_class_name", "the scheduler"))
    unusual = [key for key in ("stochastic_sampling", "invert_sigmas") if shipped.get(key)]
    if name != "FlowMatchEulerDiscreteScheduler" or unusual:
        raise ModelError(
            f"model '{where}': {' and '.join([name, *unusual])} can't be sampled here; give the model with "
            "FlowMatchEulerDiscreteScheduler (scheduler/scheduler_config.json)"
        )
