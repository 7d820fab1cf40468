"""The magnitude of what a prompt adds to the predicted noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_bench.detectors.base import Detector, Finding, View, check_counts
from nemo_bench.diffusion import Diffusion
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt


class Magnitude(Detector):
    """L2 norm of the difference between conditional and unconditional noise (Wen et al. 2024, section 3).

    The mean over images, then over the steps watched. The norm is of each image by itself; several public scripts that
    build on it take one over the whole batch, which grows with the square root of its size. Of models that predict
    velocity the difference is taken between predicted noises, so their scores are not those of noise models.

    Args:
        seeds: Images a prompt; 4 is published, 1 as well.
        steps: Steps watched: 1 is the first alone, which needs no sampling; None is all, as in the paper's main table.

    Raises:
        ConfigError: There are no seeds or steps.
    """

    title = "Noise magnitude"
    summary = "norm of the text-conditional noise, over all steps or the first ones"
    sourcing = "public code"
    citation = cite("wen2024detecting")

    def __init__(self, seeds: int = 4, steps: int | None = None) -> None:
        check_counts(self.title, seeds, steps)
        self.seeds, self.steps = seeds, steps

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        return {"magnitude": view.magnitude}

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`; ``by_step`` is the mean over images of each step."""
        by_step = torch.stack([step["magnitude"] for step in seen]).mean(1)
        return Finding(float(by_step.mean()), {"by_step": [round(value, 4) for value in by_step.tolist()]})
