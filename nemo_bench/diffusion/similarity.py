"""Settings of the similarity of noise differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, get_args

from nemo_bench.errors import ConfigError

Measure = Literal["published", "current", "fixed"]
"""Variant of SSIM and MS-SSIM. ``fixed``: data range 1, so that a value depends on its pair alone. ``current``:
torchmetrics infers the data range at every scale from all pairs compared at once, as in the public scripts of NeMo
(Hintersdorf et al. 2024). ``published``: the same with the last scale averaged without its border, as in torchmetrics
1.3.2, which those scripts pin."""
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Similarity:
    """Window and scales of the similarity; small latents need other settings than Stable Diffusion's.

    The published ones are the default (a window of 11; Hintersdorf et al. 2024, appendix).
    """

    sigma: float = 1.5  #: Standard deviation of the Gaussian window, in latent pixels.
    betas: tuple[float, ...] = (0.33, 0.33, 0.33)  #: Weights of the scales of MS-SSIM, or empty for single-scale SSIM.

    @property
    def kernel(self) -> int:
        """Side of the window that torchmetrics takes for this sigma, in latent pixels."""
        return 2 * int(3.5 * self.sigma + 0.5) + 1

    def fits(self, side: int, measure: Measure = "fixed") -> bool:
        """Whether latents with this shorter side are large enough."""
        border, scales = self.kernel // 2, max(1, len(self.betas))
        sides = [side // 2**scale for scale in range(scales)]
        # Contrast terms leave the border out, the last scale only as published; mirrored pixels must lie inside.
        cropped = sides if measure == "published" else sides[:-1]
        if not border or sides[-1] <= border or any(each <= 2 * border for each in cropped):
            return False
        # torchmetrics asks for more than is needed.
        return not self.betas or (side >= 2**scales and side // max(1, scales - 1) ** 2 >= self.kernel)

    def check(self, size: Sequence[int], measure: Measure = "fixed") -> None:
        """Raises ConfigError if latents of a height and width are too small; the message names settings that fit."""
        side = min(size)
        if self.fits(side, measure):
            return
        if self.kernel == 1:
            sigma = f"model.similarity.sigma={self.sigma:g}"
            raise ConfigError(f"{sigma}: a window of one pixel compares nothing; expected 0.15 or more")
        fewer = [replace(self, betas=self.betas[:scales]) for scales in reversed(range(len(self.betas)))]
        narrower = [replace(self, sigma=tenths / 10) for tenths in range(int(self.sigma * 10), 0, -1)]
        values = [f"betas={list(each.betas)}" for each in fewer if each.fits(side, measure)][:1]
        values += [f"sigma={each.sigma}" for each in narrower if each.fits(side, measure)][:1]
        settings = " or ".join(f"model.similarity.{value}".replace(" ", "") for value in values)
        least = next(each for each in count(1) if self.fits(each, measure))
        scales = f"{len(self.betas)} scales of MS-SSIM" if self.betas else "SSIM"
        raise ConfigError(
            f"latents of {size[0]}x{size[1]} are too small for model.similarity: {scales} with sigma={self.sigma:g} (a "
            f"window of {self.kernel}), compared as '{measure}', need sides of {least} or more; "
            + (f"set {settings}, which fit" if settings else "no window fits; take a model with larger latents")
        )
