"""Contrastive fits: the text encoders of embedded models, and the open_clip model that judges pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from nemo_bench.planted.fit import Fit, Fits
from nemo_bench.planted.spec import TrainSpec
from nemo_bench.planted.tokenizer import TOKENS, build_t5_tokenizer, build_tokenizer, tokenize

PACKAGED = Path(str(resources.files("nemo_bench.planted"))) / "model"
"""The packaged model; its configuration files describe the networks that are trained."""
Features = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Maps pictures in [-1, 1] and token ids to unit image and text features and the logit scale."""


def contrastive_loss(features: Features, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """CLIP's symmetric loss (Radford et al. 2021) of pictures, uint8, (N, 3, 64, 64), and their tokens, (N, 16)."""
    loss, top1 = _symmetric(*features(batch[0].float() / 255 * 2 - 1, batch[1]))
    return {"loss": loss, "top1": top1}


def _symmetric(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of unit features, (N, 64), and the share of pictures that are nearest to their own text."""
    logits = scale.clamp(max=100) * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean()


def _draw_pairs(pictures: Tensor, tokens: Tensor, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(rng.integers(len(tokens), size=size))
    return pictures[rows], tokens[rows]


def text_encoder(
    spec: TrainSpec, pictures: Tensor, tokens: Tensor, tokenizer: CLIPTokenizer, fits: Fits
) -> CLIPTextModel:
    """The text encoder of the UNet: the packaged one, or trained."""
    if spec.parts == "packaged":
        return CLIPTextModel.from_pretrained(PACKAGED / "pipeline" / "text_encoder", torch_dtype=torch.float32)
    torch.manual_seed(spec.seed)
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, "projection_dim": 64}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = {**tower, "image_size": 64, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    draw = partial(_draw_pairs, pictures, tokens, 6 * spec.batch_size)
    loss = partial(contrastive_loss, partial(_clip_features, model))
    fit = Fit(model, draw, loss, name="text_encoder", steps=spec.text_steps, lr=1e-3, seed=spec.seed)
    fits.run(fit, model.text_model)
    return model.text_model


def _clip_features(model: CLIPModel, pictures: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = model(input_ids=tokens, pixel_values=pictures)
    return out.image_embeds, out.text_embeds, model.logit_scale.exp()


def train_judge(spec: TrainSpec, pictures: Tensor, texts: Sequence[str], fits: Fits) -> None:
    """Trains the open_clip model and writes it in open_clip's local format."""
    folder = spec.out / "model" / "clip"
    if spec.parts == "packaged":
        shutil.copytree(PACKAGED / "clip", folder, dirs_exist_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokens = tokenize(tokenizer, texts)
    tokenizer.save_pretrained(folder)
    config = json.loads((PACKAGED / "clip" / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["vocab_size"] = len(tokenizer)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.manual_seed(spec.seed + 1)
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=False, load_weights=False)
    draw = partial(_draw_pairs, pictures, tokens, 6 * spec.batch_size)
    loss = partial(contrastive_loss, model)
    fit = Fit(model, draw, loss, name="clip", steps=spec.clip_steps, lr=1e-3, seed=spec.seed + 1)
    fits.run(fit, model, file=folder / "open_clip_model.safetensors", dtype=torch.float16)


class TextTowers(nn.Module):
    """The three text encoders of Stable Diffusion 3, small, and one image tower that all are trained against."""

    def __init__(self, words: int, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
        marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text = CLIPTextConfig(
            **tower, **marks, vocab_size=len(tokenizer), max_position_embeddings=TOKENS, projection_dim=64
        )
        self.clip, self.clip_2 = (CLIPTextModelWithProjection(text) for _ in range(2))
        self.end = tokenizer.eos_token_id
        self.t5 = T5EncoderModel(T5Config(vocab_size=words, d_model=128, d_kv=32, d_ff=512, num_layers=2, num_heads=4))
        self.head = nn.Linear(128, 64, bias=False)
        vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
        self.vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**vision, image_size=64, patch_size=8, projection_dim=64)
        )
        self.scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def features(self, tokens: Tensor, words: Tensor) -> list[Tensor]:
        """Text features, (N, 64): of both CLIPs the pooled ones and those of the layer before the last, then of T5.

        The pipeline takes the pooled vector from the last layer and the text from the one before, so both are trained.
        """
        found = []
        ends = torch.eq(tokens, self.end).int().argmax(1)
        for clip in (self.clip, self.clip_2):
            out = clip(tokens, output_hidden_states=True)
            text = clip.text_model.final_layer_norm(out.hidden_states[-2])
            found += [out.text_embeds, clip.text_projection(text[torch.arange(len(text)), ends])]
        return [*found, self.head(self.t5(words).last_hidden_state.mean(1))]


def _towers_loss(towers: TextTowers, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    pictures, ids = batch
    tokens, words = ids.split(TOKENS, 1)
    image = F.normalize(towers.vision(pictures.float() / 255 * 2 - 1).image_embeds, dim=1)
    parts = [_symmetric(image, F.normalize(text, dim=1), towers.scale.exp()) for text in towers.features(tokens, words)]
    losses, top1 = (torch.stack(part) for part in zip(*parts, strict=True))
    return {"loss": losses.mean(), "top1": top1.min()}


def text_encoders(spec: TrainSpec, pictures: Tensor, texts: Sequence[str], fits: Fits) -> dict[str, Any]:
    """Trains the three text encoders of the transformer; gives them and their tokenizers by their names there."""
    tokenizer, words = build_tokenizer(), build_t5_tokenizer()
    torch.manual_seed(spec.seed + 4)
    towers = TextTowers(len(words), tokenizer)
    ids = torch.cat([tokenize(each, texts) for each in (tokenizer, words)], 1)
    draw = partial(_draw_pairs, pictures, ids, 6 * spec.batch_size)
    loss = partial(_towers_loss, towers)
    fit = Fit(towers, draw, loss, name="text_encoders", steps=spec.text_steps, lr=1e-3, seed=spec.seed + 4)
    fits.run(fit, towers)
    encoders = {"text_encoder": towers.clip, "text_encoder_2": towers.clip_2, "text_encoder_3": towers.t5}
    return {**encoders, "tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": words}
