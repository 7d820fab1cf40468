"""Anti-memorization guidance: away from the nearest of known training images, in every step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from nemo_bench.diffusion import GRADIENT_MEMORY, Conditioning, Diffusion, Step, file_digest
from nemo_bench.diffusion.noise import unit
from nemo_bench.errors import ConfigError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.methods.descent import check_precision
from nemo_bench.metrics import SSCD
from nemo_bench.metrics.spaces import to_tensor
from nemo_bench.prompts import references_digest
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.images import open_image

_HITS, _CAPTION_SATURATION, _LASTING = 1000, 0.3, 10
"""Nearest images whose captions count; similarity from where on guidance away from a caption is full; steps that it
lasts. All of the public code."""
_SIZE, _MEAN, _STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""How SSCD takes pictures: side as in the public code, statistics of its authors."""


@dataclass(frozen=True)
class Index:
    """Training images that can be copied.

    Attributes:
        vectors: What :meth:`AMG.embed` gives for them, of length 1, (R, D).
        captions: Their captions.
    """

    vectors: Tensor
    captions: tuple[str, ...]


class AMG(Method):
    """Guides each image away from the training image it is nearest to (Chen et al. 2024).

    In a step, with s for the guidance scale, the image that the guided noise leads to is decoded, and its greatest
    similarity S to a training image decides. While S is above threshold + 0.1 exp(-0.005 t):

    - despecification: guidance falls by s1 = (s - 1) S / saturation, at most s - 1;
    - caption deduplication: if more than ``captions`` of the 1000 nearest training images share a caption y, the noise
      moves by s2 (e(empty) - e(y)), s2 = (s - 1 - s1) S / 0.3, at most s - 1 - s1; this lasts for ten steps. Of 5
      billion images the 1000 nearest are all alike; here those count that are above the threshold as well, so that a
      caption has to be there more than ``captions`` times with pictures like the image. Few prompts have as many;
    - dissimilarity: if the similarity S' of what is then led to is above the threshold as well, the noise takes on
      sigma_t strength (S' - threshold) exp((1000 - t) / 170) times the gradient of S' with respect to the latents,
      through embedding, decoder and the step to the image, the noise being held constant.

    Neighbours come from the reference images of all prompts of the run, in place of the public search of LAION by CLIP
    that is no more. Similarity is the cosine of SSCD embeddings; generated and known images both come in with the side
    of 224 of the public code and the mean and deviation of SSCD's authors, where the public code feeds two ranges of
    values, so numbers differ somewhat from those that the published constants were tuned for. Without an SSCD file it
    is the correlation of pixels (of the image's mean, of all three channels): ours, for small worlds; a higher
    threshold spares images that are alike by their background alone. The public
    code leaves the first 21 images of a run unguided, here none is.
    Decoding and embedding are no UNet passes; seconds in the records have them.

    Args:
        sscd: TorchScript file of SSCD; published: ``sscd_disc_mixup.torchscript.pt``.
        threshold: Similarity above which an image is guided, from -1 to 1. Published: 0.3.
        saturation: Similarity at which no guidance above 1 is left. Published: 0.5, which is c1 = 13 at scale 7.5.
        strength: Of dissimilarity, c3, at least 0. Published: 100.
        captions: See above, at least 1.
        legacy_ungated: Despecify at any similarity above 0, as the public code does; the paper has the threshold.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "Anti-memorization guidance"
    summary = "guidance away from the nearest of the known training images"
    touches = "guidance"
    sourcing = "paper and public code"
    citation = cite("chen2024towards")
    makes_passes = True
    needs = frozenset({"guidance", "gradients"})

    def __init__(
        self,
        sscd: str | None = None,
        threshold: float = 0.3,
        saturation: float = 0.5,
        strength: float = 100.0,
        captions: int = 20,
        legacy_ungated: bool = False,
    ) -> None:
        if not (-1 <= threshold <= 1 and saturation > 0 and 0 <= strength < math.inf and captions >= 1):
            msg = f"threshold={threshold}, saturation={saturation}, strength={strength}, captions={captions}"
            raise ConfigError(
                "amg needs a threshold from -1 to 1, a saturation above 0, a strength of 0 or more and captions of 1 "
                f"or more, given {msg}"
            )
        if not sscd:
            self.title = f"{self.title} by pixels"
        # Method.threshold is another one, that of memorization.
        self.sscd, self.limit, self.saturation, self.strength = sscd, threshold, saturation, strength
        self.captions, self.legacy_ungated = captions, legacy_ungated
        self._indices: WeakKeyDictionary[Diffusion, Index] = WeakKeyDictionary()
        self._network: nn.Module | None = None

    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        """See :meth:`Method.fingerprint`.

        Raises:
            NemoBenchError: No prompt has a training image, one can't be read, or the SSCD file is not there.
        """
        if not any(prompt.references for prompt in prompts):
            raise ConfigError("amg needs training images to keep away from, and no prompt has any: give references")
        known = {"references": references_digest(prompts)}
        if not self.sscd:
            return known
        SSCD(self.sscd).check_file()
        return {**known, "sscd": file_digest(Path(self.sscd))}

    def prepare(self, model: Diffusion, prompts: Sequence[Prompt]) -> None:
        """See :meth:`Method.prepare`.

        Raises:
            NemoBenchError: See :meth:`content`; also where a file can't be read.
        """
        if model in self._indices:
            return
        self.fingerprint(prompts)
        height, width = (side * model.pipeline.vae_scale_factor for side in model.latent_shape[1:])
        pairs = [(path, prompt.text) for prompt in prompts for path in prompt.references]
        with torch.no_grad():
            known = {path: self.embed(_picture(path, (width, height)).to(model.device)) for path in dict(pairs)}
        self._indices[model] = Index(torch.cat([known[path] for path, _ in pairs]), tuple(text for _, text in pairs))

    def embed(self, images: Tensor) -> Tensor:
        """What similarity is the dot product of; gradients go through it.

        Args:
            images: (N, 3, height, width), 0 black and 1 white.

        Returns:
            (N, D), rows of length 1.

        Raises:
            ModelError: The SSCD file can't be read.
        """
        if not self.sscd:
            flat = images.flatten(1)
            return unit(flat - flat.mean(1, keepdim=True))
        if self._network is None:
            # Weights that inference mode made take no part in gradients.
            with torch.inference_mode(False):
                self._network = SSCD(self.sscd).load().eval().to(images.device)
                for parameter in self._network.parameters():
                    parameter.requires_grad = False
        small = nn.functional.interpolate(images, (_SIZE, _SIZE), mode="bilinear", align_corners=False)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return unit(self._network((small - mean) / std))

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`.

        Raises:
            ConfigError: Nothing was prepared.
            ModelError: The model is in half precision.
        """
        check_precision(self.title, model.dtype)
        if model not in self._indices:
            raise ConfigError("amg needs to see the training images: call prepare(model, prompts)")
        guidance = _Guidance(self, model, self._indices[model], len(batch.prompts))
        yield replace(batch, rule=guidance, notes=guidance.notes)


@dataclass(frozen=True)
class _Away:
    """A caption that an image is guided away from, and for how many steps still."""

    caption: Conditioning
    steps: int


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Which rows are not the same, (N,)."""
    return (one != other).flatten(1).any(1)


class _Guidance:
    """The rule for one batch.

    Attributes:
        notes: For each image in how many steps its guidance was another than the model's.
    """

    def __init__(self, method: AMG, model: Diffusion, index: Index, images: int) -> None:
        self.method, self.model, self.index = method, model, index
        self.notes = tuple({"guided_steps": 0} for _ in range(images))
        self._away: list[_Away | None] = [None] * images

    def __call__(self, step: Step) -> Tensor:
        method, scale = self.method, step.scale
        if step.number == 0:
            self._away = [None] * len(self._away)
        limit = method.limit + 0.1 * math.exp(-0.005 * step.timestep)
        noise = step.guided(scale)
        with torch.no_grad():
            vectors = self._vectors(step, step.latents, noise)
            products = vectors @ self.index.vectors.to(vectors).T
        nearest = products.amax(1)
        near = nearest > limit
        despecified = near | method.legacy_ungated
        less = (torch.where(despecified, nearest, 0) * (scale - 1) / method.saturation).clamp(0, scale - 1)
        noise = torch.where((less > 0)[:, None, None, None], step.guided(scale - less), noise)
        noise = self._away_from_captions(step, noise, products, limit, scale - 1 - less)
        # Where nothing has moved, the similarity is still the one that is not above the limit.
        noise = self._dissimilar(step, noise, limit, near | _differ(noise, step.guided(scale)))
        for note, guided in zip(self.notes, _differ(noise, step.guided(scale)).tolist(), strict=True):
            note["guided_steps"] += guided
        return noise

    def _vectors(self, step: Step, latents: Tensor, noise: Tensor) -> Tensor:
        """Embeddings of the images that noise leads to."""
        alpha = self.model.signal(step.timestep)
        image = (latents.float() - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        return self.method.embed(self.model.decode(image))

    def _away_from_captions(self, step: Step, noise: Tensor, products: Tensor, limit: float, room: Tensor) -> Tensor:
        values, hits = products.topk(min(_HITS, products.shape[1]))
        for row in range(len(products)):
            alike = Counter(self.index.captions[hit] for hit in hits[row][values[row] > limit].tolist())
            for caption, count in alike.most_common(1):
                if count > self.method.captions:
                    self._away[row] = _Away(self.model.encode([caption]), _LASTING)
        rows = [row for row, away in enumerate(self._away) if away]
        if not rows:
            return noise
        lasting = [away for away in self._away if away]
        text = reduce(Conditioning.followed_by, (away.caption for away in lasting))
        direction = step.unconditional[rows] - self.model.predict_noise(step.latents[rows], step.timestep, text)
        wanted = (room * products.amax(1) / _CAPTION_SATURATION).clamp(min=0)
        noise = noise.clone()
        noise[rows] += torch.minimum(wanted, room)[rows][:, None, None, None] * direction
        for row, away in zip(rows, lasting, strict=True):
            self._away[row] = replace(away, steps=away.steps - 1) if away.steps > 1 else None
        return noise

    def _dissimilar(self, step: Step, noise: Tensor, limit: float, chosen: Tensor) -> Tensor:
        if not (self.method.strength and chosen.any()):
            return noise
        alpha = self.model.signal(step.timestep)
        growing = (1 - alpha) ** 0.5 * math.exp((1000 - step.timestep) / 170)
        noise = noise.clone()
        for rows in chosen.nonzero()[:, 0].split(max(1, self.method.batch_size // GRADIENT_MEMORY)):
            with torch.inference_mode(False), torch.enable_grad():
                latents = step.latents[rows].clone().float().requires_grad_()
                vectors = self._vectors(step, latents, noise[rows].clone())
                nearest = (vectors @ self.index.vectors.clone().to(vectors).T).amax(1)
                (gradient,) = torch.autograd.grad(nearest.sum(), [latents])
            above = torch.where(nearest.detach() > limit, nearest.detach() - self.method.limit, 0)
            noise[rows] += (self.method.strength * growing * above)[:, None, None, None] * gradient
        return noise


def _picture(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture as (1, 3, height, width) values in [0, 1]."""
    return to_tensor([open_image(path).resize(size, Image.Resampling.BICUBIC)])
