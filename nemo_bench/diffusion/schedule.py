"""Whether the noise schedule that a pipeline is shipped with can serve; known before weights load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_bench.diffusion.model import NO_SIGNAL, NOISE_STEPS, ddim
from nemo_bench.errors import ModelError

PREDICTIONS = ("epsilon", "v_prediction")
_BETAS = ("beta_start", "beta_schedule", "trained_betas")


def check_schedule(shipped: Mapping[str, Any], steps: int, *, predicts: bool, where: str) -> None:
    """Makes sure that images can be sampled by DDIM under a schedule, with finite latents in every step.

    Args:
        shipped: Configuration of the scheduler that the model is shipped with.
        steps: DDIM steps of a generation.
        predicts: Whether predicted noise is needed, not only images: a velocity tells images, but no noise, where
            latents are noise alone.
        where: What the configuration is of, for the message.

    Raises:
        ModelError: It has no betas, such as schedulers of flow matching and those of Karras et al. (2022); it predicts
            something else than noise or velocity; steps are too many; or latents are noise alone where noise is
            predicted (zero terminal SNR, Lin et al. 2023), which DDIM divides by what is left of the signal.
    """

    def refuse(what: str, hint: str) -> ModelError:
        return ModelError(f"model '{where}': {what}; {hint} (scheduler/scheduler_config.json)")

    name = str(shipped.get("_class_name", "the scheduler"))
    if shipped.get("use_flow_sigmas") or not any(key in shipped for key in _BETAS):
        hint = "give a model that was trained under one, with its scheduler, such as DDIMScheduler"
        raise refuse(f"{name} has no noise schedule of betas, which DDIM needs", hint)
    prediction = shipped.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise refuse(f"prediction_type={prediction} is not supported", "give a model with epsilon or v_prediction")
    try:
        scheduler = ddim(shipped)
        timesteps = []
        for count in (steps, NOISE_STEPS):
            scheduler.set_timesteps(count)
            timesteps += scheduler.timesteps.tolist()
        signal = scheduler.alphas_cumprod[timesteps]
    # diffusers raises NotImplementedError for a beta_schedule that it does not know.
    except (ValueError, TypeError, NotImplementedError, IndexError) as error:
        hint = f"expected settings of DDIMScheduler that allow model.steps={steps}"
        raise refuse(f"its schedule can't be used ({error})", hint) from error
    if not scheduler.alphas_cumprod.isfinite().all():
        raise refuse("its betas give no finite schedule", "mend beta_start, beta_end or trained_betas")
    if signal.min() < NO_SIGNAL and (predicts or prediction == "epsilon"):
        first = timesteps[int(signal.argmin())]
        reason = "from which no noise can be told" if prediction == "v_prediction" else "and the network predicts noise"
        what = f"at timestep {first} latents are noise alone (zero terminal SNR), {reason}"
        raise refuse(what, "set rescale_betas_zero_snr=false, or timestep_spacing=leading")
