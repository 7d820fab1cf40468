"""Magnitude at high noise and direction at low noise, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

from nemo_bench.detectors.base import Detector, Finding, View, check_counts
from nemo_bench.diffusion import Diffusion
from nemo_bench.types import Prompt

Angle = Literal["unconditional_difference", "conditional_difference", "unconditional_conditional"]


class Anisotropy(Detector):
    """Weighted sum of the magnitude and of an angle, without sampling (Asthana and Belagiannis 2026).

    The magnitude is that of the first step. The angle is taken on the same pure noise, at the timestep of the third
    last of 50 DDIM steps (41 for Stable Diffusion): the cosine over channels between two predictions at each position,
    then the mean over positions. Both are means over images.

    Weights are those of the public code for Stable Diffusion 1.4; it has 1 and 0.1 for 2.0, 2 and 1 for Realistic
    Vision. The paper fits them on 20 memorized prompts by logistic regression and finds 1 and 1 to work as well; its
    first weight is that of the angle.

    Args:
        seeds: Images a prompt.
        norm_weight: Of the magnitude.
        angle_weight: Of the angle.
        angle: Between which predictions: ``"unconditional_difference"`` as published, unconditional noise and what the
            prompt adds to it; ``"conditional_difference"`` and ``"unconditional_conditional"`` are other modes of the
            public code.

    Raises:
        ConfigError: There are no seeds.
    """

    title = "Anisotropy"
    summary = "first-step magnitude plus the angle of the text-conditional noise at low noise"
    citation = """@inproceedings{asthana2026detecting,
  title = {Detecting and Mitigating Memorization in Diffusion Models through Anisotropy of the Log-Probability},
  author = {Asthana, Rohan and Belagiannis, Vasileios},
  booktitle = {International Conference on Learning Representations},
  year = {2026},
  eprint = {2601.20642},
  archivePrefix = {arXiv}
}"""

    def __init__(
        self,
        seeds: int = 1,
        norm_weight: float = 1.0,
        angle_weight: float = 2.0,
        angle: Angle = "unconditional_difference",
    ) -> None:
        check_counts(self.title, seeds)
        self.seeds, self.norm_weight, self.angle_weight, self.angle = seeds, norm_weight, angle_weight, angle

    def observe(self, view: View) -> Mapping[str, Tensor]:
        """See :meth:`Detector.observe`."""
        timestep = view.model.timestep(-3)
        conditional = view.predict(timestep, view.text)
        unconditional = view.predict(timestep, view.model.unconditional(len(conditional)))
        sides = {
            "unconditional": unconditional,
            "conditional": conditional,
            "difference": conditional - unconditional,
        }
        one, other = self.angle.split("_")
        cosine = cosine_similarity(sides[one], sides[other], dim=1).mean((1, 2))
        return {"norm": view.magnitude, "cosine": cosine}

    def judge(
        self, model: Diffusion, prompt: Prompt, seen: Sequence[Mapping[str, Tensor]], images: Tensor | None
    ) -> Finding:
        """See :meth:`Detector.judge`; ``norm`` and ``cosine`` are its two terms before they are weighted."""
        norm, cosine = (float(seen[0][name].mean()) for name in ("norm", "cosine"))
        return Finding(self.norm_weight * norm + self.angle_weight * cosine, {"norm": norm, "cosine": cosine})
