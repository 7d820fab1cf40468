"""Settings of runs of the embedded model that last seconds."""

from __future__ import annotations


def small(*, seeds: int = 2, steps: int = 3) -> list[str]:
    """Few seeds, few steps, eight general prompts to calibrate on, and the CPU.

    Args:
        seeds: Images a prompt.
        steps: Denoising steps.
    """
    return [
        f"seeds={seeds}",
        "localize_seeds=3",
        f"model.steps={steps}",
        "prompts.calibration=package:planted/prompts/calibration.txt",
        "prompts.calibration_limit=8",
        "trainer=cpu",
    ]
