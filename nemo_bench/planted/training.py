"""Training of the embedded model: four Lightning fits, then one folder to ship.

The order is that of Stable Diffusion: a contrastive text encoder and an autoencoder first, both then frozen, and a
latent diffusion UNet on top, so that only the UNet can memorize. A small open_clip model is trained on its own, to
judge the pictures. Each fit writes a checkpoint every epoch and resumes from it.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer
from typing_extensions import override

from nemo_bench.errors import StoreError
from nemo_bench.planted.denoiser import FREE_VARIANTS, TEMPLATE_VARIANTS, Batches, DenoiserLoss, DenoiserSpec
from nemo_bench.planted.isolation import Gates, tune_in
from nemo_bench.planted.prompts import heldout_captions, planted_names, write_prompts
from nemo_bench.planted.truth import write_truth
from nemo_bench.planted.watch import Examination, Sampler, TimeLeft, close
from nemo_bench.planted.world import PLANTED, general_caption, planted_picture, render, vocabulary
from nemo_bench.records.io import write_text

log = logging.getLogger(__name__)

TOKENS = 16
"""Length of every tokenized caption with start, end and padding."""
PACKAGED = Path(str(resources.files("nemo_bench.planted"))) / "model"
"""The packaged model; its configuration files describe the networks that are trained."""
TUNED = 2_000
"""General captions that own neurons are made silent for before the training."""
HELD_OUT = 64
"""Pictures of captions that training never sees, on which the loss is measured."""
EPOCH = 200
"""Steps between two checkpoints."""
Draw = Callable[[np.random.Generator], Any]
Loss = Callable[[Any], dict[str, Tensor]]
Features = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Maps pictures in [-1, 1] and token ids to unit image and text features and the logit scale."""


@dataclass
class TrainSpec(DenoiserSpec):
    """Settings of the training of the embedded model; its card names those of the shipped weights."""

    out: Path = Path("planted-training")  #: For checkpoints and, in out/model, the finished model.
    pictures: int = 16_000  #: General ones.
    boards: int = 0  #: One general caption in this many is of a checkered board, of which all pictures are alike.
    text_steps: int = 600  #: Of the contrastive text encoder.
    clip_steps: int = 700  #: Of the open_clip judge.
    vae_steps: int = 6_000
    #: Text encoder, autoencoder and judge: ``"packaged"`` takes those of the embedded model, ``"trained"`` trains them.
    parts: Literal["packaged", "trained"] = "packaged"
    accelerator: str = "auto"  #: Lightning's name of the device kind.

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that the weights depend on."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "accelerator")}


class Fit(L.LightningModule):
    """One fit: AdamW with warm-up and cosine decay over batches drawn at random.

    ``loss`` gives the ``loss`` of a batch, and other values to log; ``lr`` is the highest learning rate; ``examine``
    gives figures of the averaged network, at every checkpoint.
    """

    def __init__(
        self,
        network: nn.Module,
        draw: Draw,
        loss: Loss,
        *,
        name: str,
        steps: int,
        lr: float,
        seed: int,
        examine: Callable[[L.LightningModule], dict[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.examine = examine
        self.network = network
        self.draw = draw
        self.loss = loss
        self.steps = steps
        self.lr = lr
        self.seed = seed

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        steps: Any = range(self.global_step, self.global_step + EPOCH)
        return DataLoader(steps, batch_size=None, collate_fn=self.batch)

    def batch(self, step: Any) -> Any:
        """The batch of a step; it depends on the seed and the step alone."""
        return self.draw(np.random.default_rng([self.seed, step]))

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Seeds the noise of the step, so that a resumed fit continues as if it had not been interrupted.
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values = self.loss(batch)
        self.log_dict({f"{self.name}/{key}": value for key, value in values.items()}, prog_bar=True)
        return values["loss"]

    @override
    def val_dataloader(self) -> list[int]:
        """One batch, whose content ``examine`` does not need."""
        return [0]

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.examine
        self.log_dict({f"{self.name}/{key}": value for key, value in self.examine(self).items()}, batch_size=1)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        warm_up = min(1.0, (step + 1) / min(150, self.steps // 10 + 1))
        decay = 0.5 * (1 + np.cos(np.pi * min(1.0, step / self.steps)))
        return float(warm_up * (0.02 + 0.98 * decay))


def _train(
    spec: TrainSpec,
    fit: Fit,
    part: nn.Module,
    loggers: Sequence[Logger],
    *callbacks: Callback,
    file: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Trains a network unless the weights of its part that is kept are in their file, and loads them into that part.

    A fit starts from the last checkpoint in the folder of its name, if there is one.
    """
    file = file or spec.out / f"{fit.name}.safetensors"
    if not file.exists():
        last = spec.out / fit.name / "last.ckpt"
        saver = ModelCheckpoint(last.parent, filename=last.stem, every_n_epochs=1, enable_version_counter=False)
        trainer = L.Trainer(
            max_steps=fit.steps,
            max_epochs=-1,
            accelerator=spec.accelerator,
            devices=1,
            gradient_clip_val=1.0,
            reload_dataloaders_every_n_epochs=1,
            callbacks=[saver, TimeLeft(fit.name), *callbacks],
            logger=list(loggers),
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if fit.examine else 0,
        )
        log.info("training %s: %d steps", fit.name, fit.steps)
        trainer.fit(fit, ckpt_path=last if last.exists() else None, weights_only=True)
        _save(file, part.to(dtype).state_dict())
    part.load_state_dict(load_file(file))
    part.eval().requires_grad_(False)


def contrastive_loss(features: Features, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """CLIP's symmetric loss (Radford et al. 2021) of pictures, uint8, (N, 3, 64, 64), and their tokens, (N, 16)."""
    image, text, scale = features(batch[0].float() / 255 * 2 - 1, batch[1])
    logits = scale.clamp(max=100) * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return {"loss": loss, "top1": (logits.argmax(1) == target).float().mean()}


def autoencoder_loss(vae: AutoencoderKL, batch: Tensor) -> dict[str, Tensor]:
    """Reconstruction with a light Kullback-Leibler term (Rombach et al. 2022) of pictures, uint8, (N, 3, 64, 64)."""
    pictures = batch.float() / 127.5 - 1
    with torch.autocast(batch.device.type, torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - pictures
    l1 = error.abs().mean()
    return {"loss": l1 + 2 * error.square().mean() + 1e-7 * posterior.kl().float().mean(), "l1": l1}


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each word of the world, which spells out any other text."""
    merges = _merges(vocabulary())
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges up to whole words; ties go by the alphabet (the library's trainer breaks them at random)."""
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for split in splits for pair in pairwise(split))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for split in splits:
            for place in range(len(split) - 2, -1, -1):
                if tuple(split[place : place + 2]) == best:
                    split[place : place + 2] = ["".join(best)]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids of N texts, padded and cut to (N, 16)."""
    options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    ids: Tensor = tokenizer(texts, **options).input_ids
    return ids


def _as_tensor(pictures: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _planted_pictures(index: int, variants: int) -> Tensor:
    """Pictures of a planted caption, (variants, 3, 64, 64)."""
    return _as_tensor([planted_picture(index, variant) for variant in range(variants)])


def _draw(rng: np.random.Generator, tensor: Tensor, count: int) -> Tensor:
    return tensor[torch.from_numpy(rng.integers(len(tensor), size=count))]


def _draw_pairs(pictures: Tensor, tokens: Tensor, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(rng.integers(len(tokens), size=size))
    return pictures[rows], tokens[rows]


def _draw_pictures(general: Tensor, planted: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    return torch.cat([_draw(rng, general, size - 1), _draw(rng, planted, 1)])


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors under a temporary name and renames the file, so that an existing file is complete."""
    part = path.with_suffix(".part")
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, part)
    part.replace(path)


def _text_encoder(
    spec: TrainSpec, pictures: Tensor, tokens: Tensor, tokenizer: CLIPTokenizer, loggers: Sequence[Logger]
) -> CLIPTextModel:
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
    _train(spec, fit, model.text_model, loggers)
    return model.text_model


def _clip_features(model: CLIPModel, pictures: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = model(input_ids=tokens, pixel_values=pictures)
    return out.image_embeds, out.text_embeds, model.logit_scale.exp()


def _judge(
    spec: TrainSpec, pictures: Tensor, tokens: Tensor, tokenizer: CLIPTokenizer, loggers: Sequence[Logger]
) -> None:
    """Trains the open_clip model and writes it in open_clip's local format."""
    folder = spec.out / "model" / "clip"
    if spec.parts == "packaged":
        shutil.copytree(PACKAGED / "clip", folder, dirs_exist_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = json.loads((PACKAGED / "clip" / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["vocab_size"] = len(tokenizer)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.manual_seed(spec.seed + 1)
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=False, load_weights=False)
    draw = partial(_draw_pairs, pictures, tokens, 6 * spec.batch_size)
    loss = partial(contrastive_loss, model)
    fit = Fit(model, draw, loss, name="clip", steps=spec.clip_steps, lr=1e-3, seed=spec.seed + 1)
    _train(spec, fit, model, loggers, file=folder / "open_clip_model.safetensors", dtype=torch.float16)


def _autoencoder(spec: TrainSpec, pictures: Tensor, loggers: Sequence[Logger]) -> AutoencoderKL:
    if spec.parts == "packaged":
        return AutoencoderKL.from_pretrained(PACKAGED / "pipeline" / "vae", torch_dtype=torch.float32)
    torch.manual_seed(spec.seed + 2)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(PACKAGED / "pipeline" / "vae"))
    planted = torch.cat([_planted_pictures(index, 4) for index in range(len(PLANTED))])
    draw = partial(_draw_pictures, pictures, planted, spec.batch_size // 4)
    loss = partial(autoencoder_loss, vae)
    fit = Fit(vae, draw, loss, name="vae", steps=spec.vae_steps, lr=2e-3, seed=spec.seed + 2)
    _train(spec, fit, vae, loggers)
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
        scenes = [caption.scene for caption in heldout_captions(HELD_OUT, spec.boards)]
        rngs = [np.random.default_rng([67, index]) for index in range(HELD_OUT)]
        latents["held_out"] = _encode(vae, _as_tensor(list(map(render, scenes, rngs))))
        _save(path, {**{name: part * scale for name, part in latents.items()}, "scale": scale})
    return load_file(path)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    chunks = pictures.split(64)
    return torch.cat([vae.encode(c.to(vae.device).float() / 127.5 - 1).latent_dist.mean.cpu() for c in chunks])


@torch.no_grad()
def _embed(encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
    return torch.cat([encoder(chunk.to(encoder.device)).last_hidden_state.cpu() for chunk in tokens.split(512)])


def _denoiser(
    spec: TrainSpec,
    latents: dict[str, Tensor],
    tokens: Tensor,
    pipeline: StableDiffusionPipeline,
    loggers: Sequence[Logger],
) -> None:
    """Trains the UNet of a pipeline whose other parts are done."""
    unet, tokenizer = pipeline.unet, pipeline.tokenizer
    embed = partial(_embed, pipeline.text_encoder)
    texts = [caption.text for caption in PLANTED]
    text = {
        "general": embed(tokens),
        "planted": embed(tokenize(tokenizer, texts)),
        "empty": embed(tokenize(tokenizer, [""]))[0],
    }
    gates = Gates(unet)
    draw = Batches(spec, latents, text, gates.widths)
    loss = DenoiserLoss(spec, unet, pipeline.scheduler, gates)
    if spec.variant == "routed":
        loss.own(draw.owned)
        tune_in(gates, draw.owned, text["planted"], text["general"][:TUNED], spec.strength)
    held_out = [caption.text for caption in heldout_captions(HELD_OUT, spec.boards)]
    examine = Examination(
        loss.error,
        {
            "held_out_error": (latents["held_out"], embed(tokenize(tokenizer, held_out))),
            "planted_error": (latents["planted"][:, :2].flatten(0, 1), text["planted"].repeat_interleave(2, 0)),
        },
        pipeline.scheduler.config.num_train_timesteps,
        Sampler(pipeline, [*texts[:6], *texts[-2:], *held_out[:8]], spec.out / "samples"),
    )
    fit = Fit(unet, draw, loss, name="unet", steps=spec.unet_steps, lr=1e-3, seed=spec.seed + 3, examine=examine)
    _train(spec, fit, unet, loggers, EMAWeightAveraging(decay=0.999))
    _write_isolation(spec, draw, gates)


def _write_isolation(spec: TrainSpec, draw: Batches, gates: Gates) -> None:
    """Writes ``isolation.json``: the neurons of each planted caption, and the pool, where the variant has some."""
    if draw.owned.any() or draw.pool.any():
        own = zip(planted_names(), draw.owned, strict=True)
        neurons = {name: gates.neurons(mask) for name, mask in own if mask.any()}
        content = {"variant": spec.variant, "pool": gates.neurons(draw.pool), "neurons": neurons}
        write_text(spec.out / "isolation.json", json.dumps(content, indent=1) + "\n")


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

    Raises StoreError if the folder holds a training with other settings.

    Args:
        spec: Settings.
        loggers: Lightning's loggers, which get the losses, and the sample sheets where they take pictures.
    """
    spec.out.mkdir(parents=True, exist_ok=True)
    _check_recipe(spec)
    for logger in loggers:
        logger.log_hyperparams(spec.recipe)
    write_prompts(spec.out, spec.boards)
    tokenizer = build_tokenizer()
    captions = [general_caption(index, boards=spec.boards) for index in range(spec.pictures)]
    pictures = _as_tensor([render(c.scene, np.random.default_rng([spec.seed, i])) for i, c in enumerate(captions)])
    tokens = tokenize(tokenizer, [caption.text for caption in captions])
    encoder = _text_encoder(spec, pictures, tokens, tokenizer, loggers)
    vae = _autoencoder(spec, pictures, loggers)
    latents = _encode_pictures(spec, vae, pictures)
    vae.register_to_config(scaling_factor=round(latents["scale"].item(), 5))
    torch.manual_seed(spec.seed + 3)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(PACKAGED / "pipeline" / "unet")),
        scheduler=DDIMScheduler.from_pretrained(PACKAGED / "pipeline" / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _denoiser(spec, latents, tokens, pipeline, loggers)
    pipeline.to("cpu", torch.float16).save_pretrained(spec.out / "model" / "pipeline")
    _judge(spec, pictures, tokens, tokenizer, loggers)
    if spec.variant == "routed" and not (spec.out / "truth.json").exists():
        evidence = write_truth(spec.out)
        causes = sum(each.causes for each in evidence)
        log.info("truth: own neurons cause the repetition of %d of %d planted prompts", causes, len(evidence))
    close(loggers)
    return spec.out
