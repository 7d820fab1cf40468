"""Magnitude of the difference between conditional and unconditional noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors.base import Detector, DetectorScore, Observed, View
from nemo_bench.diffusion import FAMILIES, Diffusion
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Count


@dataclass(eq=False)
class Magnitude(Detector):
    """L2 norm of the difference between conditional and unconditional noise (Wen et al. 2024, section 3).

    The score is the mean over images, then over steps; ``by_step`` in the details is the first mean. Each image has its
    own norm; several public scripts that build on it take one over the whole batch, which grows with the square root of
    its size. For models that predict velocity the difference is between predicted noises, so their scores are not
    comparable with those of noise models; neither are those of flow matching, whose differences are between velocities.
    """

    title = "Noise magnitude"
    summary = "norm of the text-conditional noise, over all steps or the first ones"
    sourcing = "public code"
    citation = cite("wen2024detecting")
    families = frozenset(FAMILIES)

    seeds: Count = 4  #: Images a prompt; 4 is published, 1 as well.
    #: Steps observed: 1 is the first alone, which needs no sampling; None is all, as in the paper's main table.
    steps: Count | None = None

    @override
    def observe(self, view: View) -> Mapping[str, Tensor]:
        return {"magnitude": view.step.magnitude}

    @override
    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        by_step = torch.stack([step["magnitude"] for step in observed]).mean(1)
        return DetectorScore(float(by_step.mean()), {"by_step": [round(value, 4) for value in by_step.tolist()]})
