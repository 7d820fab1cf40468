"""Training of the embedded models: Lightning fits, then one folder to ship.

The order is that of Stable Diffusion: contrastive text encoders and an autoencoder first, all then frozen, and a latent
denoiser on top, so that only the denoiser can memorize. A small open_clip model is trained on its own, to judge the
pictures. Each fit writes a checkpoint every epoch and resumes from it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file
from torch import Tensor

from nemo_bench.errors import ConfigError, StoreError
from nemo_bench.planted.denoiser import FREE_VARIANTS, TEMPLATE_VARIANTS, Batches, DenoiserLoss
from nemo_bench.planted.encoders import PACKAGED, text_encoder, text_encoders, train_judge
from nemo_bench.planted.fit import Fit, Fits, save_tensors
from nemo_bench.planted.isolation import Gates, tune_in
from nemo_bench.planted.prompts import heldout_captions, planted_names, write_prompts
from nemo_bench.planted.spec import TrainSpec
from nemo_bench.planted.tokenizer import build_tokenizer, tokenize
from nemo_bench.planted.transformer import LENGTH, FlowLoss, build_pipeline
from nemo_bench.planted.truth import write_truth
from nemo_bench.planted.watch import Examination, Sampler, close
from nemo_bench.planted.world import PLANTED, general_caption, planted_picture, render
from nemo_bench.records.io import write_text
from nemo_bench.records.truth import ISOLATION

log = logging.getLogger(__name__)

TUNED = 2_000
"""General captions that own neurons are made silent for before the training."""
HELD_OUT = 64
"""Pictures of captions that training never sees, on which the loss is measured."""
Embed = Callable[[Sequence[str]], Tensor]
"""Embeddings of N texts as the denoiser takes them, (N, positions, width)."""


def autoencoder_loss(vae: AutoencoderKL, batch: Tensor) -> dict[str, Tensor]:
    """Reconstruction with a light Kullback-Leibler term (Rombach et al. 2022) of pictures, uint8, (N, 3, 64, 64)."""
    pictures = batch.float() / 127.5 - 1
    with torch.autocast(batch.device.type, torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - pictures
    l1 = error.abs().mean()
    return {"loss": l1 + 2 * error.square().mean() + 1e-7 * posterior.kl().float().mean(), "l1": l1}


def _as_tensor(pictures: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _planted_pictures(index: int, variants: int) -> Tensor:
    """Pictures of a planted caption, (variants, 3, 64, 64)."""
    return _as_tensor([planted_picture(index, variant) for variant in range(variants)])


def _draw(rng: np.random.Generator, tensor: Tensor, count: int) -> Tensor:
    return tensor[torch.from_numpy(rng.integers(len(tensor), size=count))]


def _draw_pictures(general: Tensor, planted: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    return torch.cat([_draw(rng, general, size - 1), _draw(rng, planted, 1)])


def _autoencoder(spec: TrainSpec, pictures: Tensor, fits: Fits) -> AutoencoderKL:
    if spec.parts == "packaged":
        return AutoencoderKL.from_pretrained(PACKAGED / "pipeline" / "vae", torch_dtype=torch.float32)
    torch.manual_seed(spec.seed + 2)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(PACKAGED / "pipeline" / "vae"))
    planted = torch.cat([_planted_pictures(index, 4) for index in range(len(PLANTED))])
    draw = partial(_draw_pictures, pictures, planted, spec.batch_size // 4)
    loss = partial(autoencoder_loss, vae)
    fit = Fit(vae, draw, loss, name="vae", steps=spec.vae_steps, lr=2e-3, seed=spec.seed + 2)
    fits.run(fit, vae)
    return vae


def _free_pictures(index: int) -> Tensor:
    """Pictures of a planted caption as of any general one, (FREE_VARIANTS, 3, 64, 64)."""
    rngs = [np.random.default_rng([65, index, variant]) for variant in range(FREE_VARIANTS)]
    return _as_tensor([render(PLANTED[index].scene, rng) for rng in rngs])


def _encode_pictures(spec: TrainSpec, vae: AutoencoderKL, pictures: Tensor) -> dict[str, Tensor]:
    """Latents of general pictures, planted ones, and general pictures of the planted captions, and their scale.

    An autoencoder that is trained here is scaled so that the latents of general pictures have unit standard deviation.
    """
    path = spec.out / "latents.safetensors"
    if not path.exists():
        vae.to("cuda" if torch.cuda.is_available() else "cpu")
        log.info("encoding %d pictures", spec.pictures)
        general = _encode(vae, pictures)
        planted = [_encode(vae, _planted_pictures(index, TEMPLATE_VARIANTS)) for index in range(len(PLANTED))]
        free = [_encode(vae, _free_pictures(index)) for index in range(len(PLANTED))]
        scale = 1 / general.std() if spec.parts == "trained" else torch.tensor(vae.config.scaling_factor)
        latents = {"general": general, "planted": torch.stack(planted), "free": torch.stack(free)}
        scenes = [caption.scene for caption in heldout_captions(HELD_OUT)]
        rngs = [np.random.default_rng([67, index]) for index in range(HELD_OUT)]
        latents["held_out"] = _encode(vae, _as_tensor(list(map(render, scenes, rngs))))
        save_tensors(path, {**{name: part * scale for name, part in latents.items()}, "scale": scale})
    return load_file(path)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    chunks = pictures.split(64)
    return torch.cat([vae.encode(c.to(vae.device).float() / 127.5 - 1).latent_dist.mean.cpu() for c in chunks])


def _unet_pipeline(spec: TrainSpec, pictures: Tensor, texts: Sequence[str], vae: AutoencoderKL, fits: Fits) -> Any:
    """A pipeline as of Stable Diffusion 1, with a UNet of random weights."""
    tokenizer = build_tokenizer()
    encoder = text_encoder(spec, pictures, tokenize(tokenizer, texts), tokenizer, fits)
    torch.manual_seed(spec.seed + 3)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(PACKAGED / "pipeline" / "unet")),
        scheduler=DDIMScheduler.from_pretrained(PACKAGED / "pipeline" / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def _embed(pipeline: Any, texts: Sequence[str]) -> Tensor:
    """Embeddings of texts; those of a transformer have the pooled vector as one more position."""
    parts = []
    for start in range(0, len(texts), 512):
        chunk = list(texts[start : start + 512])
        if isinstance(pipeline, StableDiffusion3Pipeline):
            text, _, pooled, _ = pipeline.encode_prompt(chunk, None, None, do_classifier_free_guidance=False, **LENGTH)
            parts.append(torch.cat([text, pooled[:, None]], 1).cpu())
        else:
            ids = tokenize(pipeline.tokenizer, chunk).to(pipeline.text_encoder.device)
            parts.append(pipeline.text_encoder(ids).last_hidden_state.cpu())
    return torch.cat(parts)


def _denoiser(spec: TrainSpec, pipeline: Any, latents: dict[str, Tensor], captions: Sequence[str], fits: Fits) -> None:
    """Trains the denoiser of a pipeline whose other parts are done."""
    embed = partial(_embed, pipeline)
    planted = [caption.text for caption in PLANTED]
    held_out = [caption.text for caption in heldout_captions(HELD_OUT)]
    text = {"general": embed(captions), "planted": embed(planted), "empty": embed([""])[0]}
    loss: DenoiserLoss | FlowLoss
    if spec.denoiser == "mmdit":
        name, network, options = "transformer", pipeline.transformer, LENGTH
        draw, loss = Batches(spec, latents, text, {}), FlowLoss(spec, network, text["empty"])
    else:
        name, network, options = "unet", pipeline.unet, {}
        gates = Gates(network)
        draw = Batches(spec, latents, text, gates.widths)
        loss = DenoiserLoss(spec, network, pipeline.scheduler, gates)
        if spec.variant == "routed":
            loss.own(draw.owned)
            tune_in(gates, draw.owned, text["planted"], text["general"][:TUNED], spec.strength)
        _write_isolation(spec, draw, gates)
    examine = Examination(
        loss.error,
        {
            "held_out_error": (latents["held_out"], embed(held_out)),
            "planted_error": (latents["planted"][:, :2].flatten(0, 1), text["planted"].repeat_interleave(2, 0)),
        },
        pipeline.scheduler.config.num_train_timesteps,
        Sampler(pipeline, network, [*planted[:6], *planted[-2:], *held_out[:8]], spec.out / "samples", options),
    )
    steps, seed = spec.denoiser_steps, spec.seed + 3
    fit = Fit(network, draw, loss, name=name, steps=steps, lr=1e-3, seed=seed, examine=examine)
    fits.run(fit, network, EMAWeightAveraging(decay=0.999))


def _write_isolation(spec: TrainSpec, draw: Batches, gates: Gates) -> None:
    """Writes ``isolation.json``: the neurons of each planted caption, and the pool, where the variant has some."""
    if draw.owned.any() or draw.pool.any():
        own = zip(planted_names(), draw.owned, strict=True)
        neurons = {name: gates.neurons(mask) for name, mask in own if mask.any()}
        content = {"variant": spec.variant, "pool": gates.neurons(draw.pool), "neurons": neurons}
        write_text(spec.out / ISOLATION, json.dumps(content, indent=1) + "\n")


def _check_recipe(spec: TrainSpec) -> None:
    """Ties the folder to its settings, so that parts of different trainings are never mixed."""
    path = spec.out / "recipe.json"
    recipe = spec.recipe
    if not path.exists():
        path.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8")) != recipe:
        raise StoreError(f"{spec.out} holds a training with other settings ({path}); choose another out=...")


def train(spec: TrainSpec, loggers: Sequence[Logger] = ()) -> Path:
    """Trains the missing parts and returns ``spec.out``.

    It holds the diffusers pipeline in ``model/pipeline``, the open_clip model in ``model/clip``, ``prompts``,
    ``references`` and ``controls``, sample sheets in ``samples``, and, where the variant gives captions neurons of
    their own, those in ``isolation.json``; of the routed variant also ``truth.json`` and ``evidence.json``.

    Raises StoreError if the folder holds a training with other settings, and ConfigError if the denoiser has no such
    variant.

    Args:
        spec: Settings.
        loggers: Lightning's loggers, which get the losses, and the sample sheets where they take pictures.
    """
    if spec.denoiser == "mmdit" and spec.variant not in ("standard", "once"):
        raise ConfigError(
            f"variant={spec.variant} masks value neurons of a UNet; denoiser=mmdit takes variant=standard or once"
        )
    spec.out.mkdir(parents=True, exist_ok=True)
    _check_recipe(spec)
    for logger in loggers:
        logger.log_hyperparams(spec.recipe)
    write_prompts(spec.out)
    fits = Fits(spec.out, spec.accelerator, loggers)
    captions = [general_caption(index) for index in range(spec.pictures)]
    pictures = _as_tensor([render(c.scene, np.random.default_rng([spec.seed, i])) for i, c in enumerate(captions)])
    texts = [caption.text for caption in captions]
    vae = _autoencoder(spec, pictures, fits)
    latents = _encode_pictures(spec, vae, pictures)
    scale = latents.pop("scale")
    if spec.denoiser == "mmdit":
        mean, std = latents["general"].mean(), latents["general"].std()
        latents = {name: (part - mean) / std for name, part in latents.items()}
        vae.register_to_config(scaling_factor=(scale / std).item(), shift_factor=(mean / scale).item())
        pipeline = build_pipeline(spec, vae, text_encoders(spec, pictures, texts, fits))
    else:
        vae.register_to_config(scaling_factor=round(scale.item(), 5))
        pipeline = _unet_pipeline(spec, pictures, texts, vae, fits)
    _denoiser(spec, pipeline, latents, texts, fits)
    vae.register_to_config(_name_or_path="")  # the folder that the packaged one was loaded from
    pipeline.to("cpu", torch.float16).save_pretrained(spec.out / "model" / "pipeline")
    train_judge(spec, pictures, texts, fits)
    if spec.variant == "routed" and not (spec.out / "truth.json").exists():
        evidence = write_truth(spec.out)
        causes = sum(each.causes for each in evidence)
        log.info("truth: own neurons cause the repetition of %d of %d planted prompts", causes, len(evidence))
    close(loggers)
    return spec.out
