"""The DDIM schedule that models sample by, and its checks before weights load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_bench.errors import ModelError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

NO_SIGNAL = 1e-6
"""Share of the signal in the variance of latents below which they are pure noise."""
NOISE_STEPS = 50
"""DDIM steps that the timestep of noise differences refers to (Hintersdorf et al. 2024)."""
_PREDICTIONS = ("epsilon", "v_prediction")
_BETAS = ("beta_start", "beta_schedule", "trained_betas")
# Settings of Stable Diffusion where a shipped scheduler has none; the defaults of DDIM are made for pixels.
_DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}


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
