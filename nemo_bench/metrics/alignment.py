"""Alignment of images with their prompt, by open_clip."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from nemo_bench.errors import ModelError
from nemo_bench.metrics.base import BenchMetric


class ClipJudge(nn.Module):
    """An open_clip model with its own preprocessing and tokenizer, always with trained weights.

    Args:
        model: Architecture name, or ``local-dir:FOLDER`` with an ``open_clip_config.json`` and weights.
        pretrained: Weights tag or file; unused for a local folder.

    Raises:
        ModelError: The weights can't be had.
    """

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        super().__init__()
        try:
            self.network, self.preprocess = open_clip.create_model_from_pretrained(model, pretrained)
            self.tokenizer = open_clip.get_tokenizer(model)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            msg = f"no weights for open_clip model '{model}', pretrained '{pretrained}' ({error})"
            raise ModelError(f"{msg}; give a known pair, a weights file, or local-dir:FOLDER") from error
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit image embeddings, (N, D), float32."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        features: Tensor = self.network.encode_image(pixels, normalize=True)
        return features.float()

    @torch.no_grad()
    def embed_text(self, text: str) -> Tensor:
        """Unit text embedding, (D,), float32; the text is cut at the tokenizer's length."""
        features: Tensor = self.network.encode_text(self.tokenizer([text]).to(self.device), normalize=True)
        return features[0].float()


class Alignment(BenchMetric):
    """Cosine of image and text embedding, always against the original prompt."""

    title = "CLIP alignment"
    description = "cosine similarity of the open_clip embeddings of image and original prompt"
    citation = "Radford et al. 2021; Hessel et al. 2021"
    needs = frozenset({"embeddings", "text_embedding"})
    higher_is_better = True
    lower, upper = -1.0, 1.0

    def score(self, embeddings: Tensor, text_embedding: Tensor) -> Tensor:  # type: ignore[override]
        """Cosines, (S,) in [-1, 1]."""
        return embeddings @ text_embedding
