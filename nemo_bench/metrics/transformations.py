"""Changes of a picture that leave a copy a copy, to see how robust measures of similarity are."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Transformation = Callable[[Image.Image, int], Image.Image]
"""Changes an RGB picture; the number seeds what is random."""
UNCHANGED = "unchanged"


def _crop(picture: Image.Image, _: int, share: float) -> Image.Image:
    """The middle, enlarged to the size of the whole; ``share`` is that of each side."""
    return ImageOps.fit(picture, picture.size, Image.Resampling.BICUBIC, bleed=(1 - share) / 2)


def _blur(picture: Image.Image, _: int, share: float) -> Image.Image:
    """A Gaussian whose deviation is a share of the shorter side."""
    return picture.filter(ImageFilter.GaussianBlur(share * min(picture.size)))


def _brightness(picture: Image.Image, _: int, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(factor)


def _saturation(picture: Image.Image, _: int, factor: float) -> Image.Image:
    return ImageEnhance.Color(picture).enhance(factor)


def _hue(picture: Image.Image, _: int, degrees: float) -> Image.Image:
    """Turns all hues around the color circle."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = hue.point([round(level + degrees / 360 * 256) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _jpeg(picture: Image.Image, _: int, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _flip(picture: Image.Image, _: int) -> Image.Image:
    return ImageOps.mirror(picture)


def _noise(picture: Image.Image, seed: int, deviation: float) -> Image.Image:
    """Normal noise on every value, of a deviation in [0, 1]."""
    pixels = np.asarray(picture, np.float64)
    noisy = pixels + 255 * deviation * np.random.default_rng(seed).standard_normal(pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


TRANSFORMATIONS: Mapping[str, Transformation] = {
    UNCHANGED: lambda picture, _: picture,
    "crop 90%": partial(_crop, share=0.9),
    "crop 70%": partial(_crop, share=0.7),
    "blur 1%": partial(_blur, share=0.01),
    "blur 3%": partial(_blur, share=0.03),
    "dark × 0.6": partial(_brightness, factor=0.6),
    "bright × 1.4": partial(_brightness, factor=1.4),
    "hue 30°": partial(_hue, degrees=30.0),
    "hue 90°": partial(_hue, degrees=90.0),
    "gray": partial(_saturation, factor=0.0),
    "JPEG 50": partial(_jpeg, quality=50),
    "JPEG 10": partial(_jpeg, quality=10),
    "flip": _flip,
    "noise 0.05": partial(_noise, deviation=0.05),
    "noise 0.15": partial(_noise, deviation=0.15),
}
"""By name, with the strength: share of each side that is left, deviation of the blur as a share of the shorter side,
factor of brightness, angle on the color circle, quality, deviation of the noise on values in [0, 1]."""
