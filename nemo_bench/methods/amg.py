"""Anti-memorization guidance: away from the nearest of known training images, in every step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from nemo_bench.diffusion import FAMILIES, GRADIENT_MEMORY, Conditioning, Diffusion, Step
from nemo_bench.diffusion.noise import unit
from nemo_bench.errors import ConfigError
from nemo_bench.localization import Threshold
from nemo_bench.methods.base import Batch, Method, Setup
from nemo_bench.methods.descent import check_precision
from nemo_bench.prompts import references_digest
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.images import open_image
from nemo_bench.records.io import file_digest
from nemo_bench.records.ranges import Count, NotNegative, Positive

NEAREST = 1000  # Nearest images whose captions count.
CAPTION_SATURATION = 0.3  # Similarity from which guidance away from a caption is full.
CAPTION_STEPS = 10  # Steps of guidance away from a caption.
SSCD_SIZE = 224  # Side of images for SSCD; all four numbers are those of the public code.
SSCD_MEAN = (0.485, 0.456, 0.406)
SSCD_STD = (0.229, 0.224, 0.225)


class TrainingImages(NamedTuple):
    """Images to guide away from: their embeddings by :meth:`AMG.embed`, (R, D), and their captions."""

    vectors: Tensor
    captions: tuple[str, ...]


@dataclass(eq=False)
class AMG(Method):
    """Guides each image away from the training image it is nearest to (Chen et al. 2024).

    AMG sees the reference images used for evaluation, so its scores are optimistic. They take the place of the public
    search of LAION by CLIP, which is offline.

    Each step, with guidance scale s, decodes the image that the guided noise leads to, and takes its greatest
    similarity S to a training image. While S is above threshold + 0.1 exp(-0.005 t):

    - despecification: guidance falls by s1 = (s - 1) S / saturation, at most s - 1;
    - caption deduplication: if more than ``captions`` of the 1000 nearest training images share a caption y, the noise
      moves by s2 (e(empty) - e(y)), s2 = (s - 1 - s1) S / 0.3, at most s - 1 - s1, for ten steps. Of 5 billion images
      the 1000 nearest are all alike; here only those above the threshold count. Few prompts have as many;
    - dissimilarity: if the similarity S' after these two is above the threshold as well, the noise grows by
      sigma_t strength (S' - threshold) exp((1000 - t) / 170) times the gradient of S' with respect to the latents,
      through embedding, decoder and the step to the image, at constant noise.

    Similarity is the cosine of SSCD embeddings, of images of side 224 as in the public code, normalized as by SSCD's
    authors where the public code mixes two ranges of values, so similarities differ somewhat from those behind the
    published constants. Without an SSCD file it is the correlation of pixels, all three channels together: ours, for
    small worlds; a higher threshold spares images that share a background alone. The public code leaves the first 21
    images of a run unguided, here all are guided. Decoding and embedding are no UNet passes, but count in seconds.

    Nothing is published for transformers. There t is the timestep of Stable Diffusion with the same ratio of signal to
    noise. For flow matching the network predicts velocity, which changes by 1 / (1 - s) where noise changes by 1; s is
    0.93 at most in that factor, Stable Diffusion's first step.
    """

    title = "Anti-memorization guidance"
    summary = "guidance away from the nearest of the known training images"
    touches = "guidance"
    sourcing = "paper and public code"
    citation = cite("chen2024towards")
    makes_passes = True
    needs = frozenset({"guidance", "gradients"})
    families = frozenset(FAMILIES)

    sscd: str | None = None  #: TorchScript file of SSCD; published: ``sscd_disc_mixup.torchscript.pt``.
    threshold: Threshold = 0.3  #: Similarity above which an image is guided. Published: 0.3.
    #: Similarity at which guidance falls to 1. Published: 0.5, which is c1 = 13 at scale 7.5.
    saturation: Positive = 0.5
    strength: NotNegative = 100.0  #: Weight of dissimilarity, c3.
    captions: Count = 20
    #: Despecify at any similarity above 0, as the public code does; the paper has the threshold.
    legacy_ungated: bool = False
    training_images: TrainingImages | None = field(default=None, init=False)
    _network: nn.Module | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sscd:
            self.title = f"{self.title} by pixels"

    @override
    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        if not any(prompt.references for prompt in prompts):
            raise ConfigError("amg needs training images to keep away from, and no prompt has any: give references")
        digests = {"references": references_digest(prompts)}
        if self.sscd:
            self._sscd().check_file()
            digests["sscd"] = file_digest(Path(self.sscd))
        return digests

    def _sscd(self) -> Any:
        from nemo_bench.metrics import SSCD  # takes seconds to import, and pixels need none

        return SSCD(self.sscd or "")

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        from nemo_bench.metrics.spaces import to_tensor

        super().setup(model, setup)
        self.fingerprint(setup.prompts)  # for its checks
        pairs = [(path, prompt.text) for prompt in setup.prompts for path in prompt.references]
        height, width = (side * model.pipeline.vae_scale_factor for side in model.latent_shape[1:])
        embedded: dict[Path, Tensor] = {}
        for path in dict.fromkeys(path for path, _ in pairs):
            picture = open_image(path).resize((width, height), Image.Resampling.BICUBIC)
            with torch.no_grad():
                embedded[path] = self.embed(to_tensor([picture]).to(model.device))
        vectors = torch.cat([embedded[path] for path, _ in pairs])
        self.training_images = TrainingImages(vectors, tuple(text for _, text in pairs))

    def embed(self, images: Tensor) -> Tensor:
        """Embeds images so that their dot product is their similarity; with gradients.

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
            # Weights made in inference mode take no part in gradients.
            with torch.inference_mode(False):
                self._network = self._sscd().load().eval().to(images.device)
                for parameter in self._network.parameters():
                    parameter.requires_grad = False
        small = nn.functional.interpolate(images, (SSCD_SIZE, SSCD_SIZE), mode="bilinear", align_corners=False)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (SSCD_MEAN, SSCD_STD))
        return unit(self._network((small - mean) / std))

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        check_precision(self.title, model.dtype)
        if self.training_images is None:
            raise ConfigError("amg needs training images: call setup(model, Setup(prompts=...)) first")
        guidance = Guidance(self, model, self.training_images, len(batch.prompts))
        yield replace(batch, rule=guidance, notes=guidance.notes)


@dataclass(eq=False)
class Guidance:
    """The rule for one batch.

    Attributes:
        notes: For each image the number of steps whose guidance was changed.
    """

    method: AMG
    model: Diffusion
    known: TrainingImages
    images: int

    def __post_init__(self) -> None:
        self.notes = tuple({"guided_steps": 0} for _ in range(self.images))
        self._captions: dict[int, Conditioning] = {}
        self._caption_steps = [0] * self.images

    def __call__(self, step: Step) -> Tensor:
        """The guided noise of a step, (N, channels, height, width)."""
        method = self.method
        if step.number == 0:
            self._caption_steps = [0] * self.images
        limit = method.threshold + 0.1 * math.exp(-0.005 * self.model.schedule.published(step.timestep))
        plain = step.guided(step.scale)
        with torch.no_grad():
            vectors = self._vectors(step, step.latents, plain)
            similarities = vectors @ self.known.vectors.to(vectors).T
        nearest = similarities.amax(1)
        is_near = nearest > limit
        despecified = torch.where(is_near | method.legacy_ungated, nearest, 0)
        less = (despecified * (step.scale - 1) / method.saturation).clamp(0, step.scale - 1)
        noise = torch.where((less > 0)[:, None, None, None], step.guided(step.scale - less), plain)
        noise = self._away_from_captions(step, noise, similarities, limit, step.scale - 1 - less)
        # An image whose noise has not moved is as similar as before, hence not above the limit.
        noise = self._dissimilar(step, noise, limit, is_near | rows_differ(noise, plain))
        for note, is_guided in zip(self.notes, rows_differ(noise, plain).tolist(), strict=True):
            note["guided_steps"] += is_guided
        return noise

    def _vectors(self, step: Step, latents: Tensor, noise: Tensor) -> Tensor:
        """Embeddings of the images that noise leads to."""
        return self.method.embed(self.model.decode(self.model.schedule.clean(noise, step.timestep, latents)))

    def _away_from_captions(
        self, step: Step, noise: Tensor, similarities: Tensor, limit: float, scale_left: Tensor
    ) -> Tensor:
        values, hits = similarities.topk(min(NEAREST, similarities.shape[1]))
        for row in range(len(similarities)):
            captions = Counter(self.known.captions[hit] for hit in hits[row][values[row] > limit].tolist())
            for caption, count in captions.most_common(1):
                if count > self.method.captions:
                    self._captions[row] = self.model.encode([caption])
                    self._caption_steps[row] = CAPTION_STEPS
        rows = [row for row, steps in enumerate(self._caption_steps) if steps]
        if not rows:
            return noise
        text = reduce(Conditioning.followed_by, (self._captions[row] for row in rows))
        direction = step.unconditional[rows] - self.model.predict_noise(step.latents[rows], step.timestep, text)
        wanted = (scale_left * similarities.amax(1) / CAPTION_SATURATION).clamp(min=0)
        noise = noise.clone()
        noise[rows] += torch.minimum(wanted, scale_left)[rows][:, None, None, None] * direction
        for row in rows:
            self._caption_steps[row] -= 1
        return noise

    def _dissimilar(self, step: Step, noise: Tensor, limit: float, chosen: Tensor) -> Tensor:
        if not (self.method.strength and chosen.any()):
            return noise
        schedule = self.model.schedule
        deviation = (1 - schedule.signal(step.timestep)) ** 0.5
        factor = self.method.strength * deviation * math.exp((1000 - schedule.published(step.timestep)) / 170)
        noise = noise.clone()
        for rows in chosen.nonzero()[:, 0].split(max(1, self.method.batch_size // GRADIENT_MEMORY)):
            with torch.inference_mode(False), torch.enable_grad():
                latents = step.latents[rows].clone().float().requires_grad_()
                vectors = self._vectors(step, latents, noise[rows].clone())
                nearest = (vectors @ self.known.vectors.clone().to(vectors).T).amax(1)
                (gradient,) = torch.autograd.grad(nearest.sum(), [latents])
            above = torch.where(nearest.detach() > limit, nearest.detach() - self.method.threshold, 0)
            noise[rows] += schedule.change((factor * above)[:, None, None, None] * gradient, step.timestep)
        return noise


def rows_differ(one: Tensor, other: Tensor) -> Tensor:
    """Whether each row of two tensors differs, (N,)."""
    return (one != other).flatten(1).any(1)
