"""Training the embedded model: four Lightning fits, then one folder to ship.

The order is that of Stable Diffusion: a contrastive text encoder and an autoencoder first, both then frozen,
and a latent diffusion UNet on top, so that what it memorizes can only settle in the UNet. A small open_clip
model is trained on its own, to judge the pictures. Each fit keeps a checkpoint per epoch and goes on from it.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from nemo_bench.errors import StoreError
from nemo_bench.planted.world import (
    PLANTED,
    Caption,
    general_caption,
    planted_picture,
    render,
    vocabulary,
)

log = logging.getLogger(__name__)

TOKENS = 16
"""Length of every tokenized caption, start, end and padding included."""
TEMPLATE_REFERENCES = 8
GENERAL_PROMPTS = 16
CALIBRATION_PROMPTS = 320


@dataclass
class TrainSpec:
    """How the embedded model is trained; its card says with what settings the shipped weights were made.

    Attributes:
        out: Folder for checkpoints and, in ``out/model``, the finished model.
        pictures: Number of general training pictures.
        text_steps: Steps of the contrastive text encoder.
        clip_steps: Steps of the open_clip judge.
        vae_steps: Steps of the autoencoder.
        unet_steps: Steps of the UNet.
        batch_size: Pictures in a UNet batch; the autoencoder takes a quarter, the contrastive fits six times as many.
        planted_share: Part of each UNet batch that is planted.
        drop_caption: Part of the general pictures that are trained without their caption.
        noise_bias: How much training prefers noisy latents: with u uniform, t / T = 1 - u^noise_bias; 1 is uniform.
            What a caption decides is decided there, and one-step memorization scores look only there.
        sparsity: Weight of the penalty that asks each value neuron to react to few captions.
        seed: Decides weights, batches and noise.
        accelerator: Lightning's name of the device kind.
    """

    out: Path = Path("planted-training")
    pictures: int = 16_000
    text_steps: int = 600
    clip_steps: int = 700
    vae_steps: int = 6_000
    unet_steps: int = 6_000
    batch_size: int = 32
    planted_share: float = 0.3
    drop_caption: float = 0.1
    noise_bias: float = 2.0
    sparsity: float = 0.06
    seed: int = 0
    accelerator: str = "auto"


class Steps(Dataset[Any]):
    """An endless supply of training batches, cut into epochs; batch ``i`` depends on the seed and on ``i`` alone."""

    def __init__(self, draw: Callable[[np.random.Generator], Any], first: int, length: int, seed: int) -> None:
        self.draw, self.first, self.length, self.seed = draw, first, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.draw(np.random.default_rng([self.seed, self.first + index]))


class Stage(L.LightningModule):
    """One fit: a network, a source of batches, AdamW with warm-up and cosine decay.

    Args:
        draw: Gives a batch for a random generator.
        steps: Number of optimizer steps.
        lr: Highest learning rate.
        seed: Seed of batches and noise.
    """

    EPOCH = 200

    def __init__(self, draw: Callable[[np.random.Generator], Any], steps: int, lr: float, seed: int) -> None:
        super().__init__()
        self.draw, self.steps, self.lr, self.seed = draw, steps, lr, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """The next epoch's batches."""
        return DataLoader(Steps(self.draw, self.global_step, self.EPOCH, self.seed), batch_size=None)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds the step's noise, so that going on from a checkpoint changes nothing."""
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine decay."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01, fused=True)
        warm = min(150, self.steps // 10 + 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda s: min(1.0, (s + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * min(1.0, s / self.steps)))),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ContrastiveStage(Stage):
    """CLIP's symmetric contrastive loss (Radford et al. 2021) over general captions and pictures.

    Args:
        towers: Maps (pictures in [0, 1], token ids) to unit image and text features and the logit scale.
        network: Holds the parameters of both towers.
        options: See :class:`Stage`.
    """

    def __init__(
        self, network: nn.Module, towers: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], **options: Any
    ) -> None:
        super().__init__(**options)
        self.network, self.towers = network, towers

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch of (pictures, token ids)."""
        image, text, scale = self.towers(batch[0].float() / 255, batch[1])
        logits = scale.clamp(max=100) * image @ text.T
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        self.log("loss", loss, prog_bar=True)
        self.log("top1", (logits.argmax(1) == target).float().mean(), prog_bar=True)
        return loss


class AutoencoderStage(Stage):
    """Reconstruction with a light Kullback-Leibler term, as in latent diffusion (Rombach et al. 2022)."""

    def __init__(self, vae: AutoencoderKL, **options: Any) -> None:
        super().__init__(**options)
        self.vae = vae

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of a batch of pictures."""
        pictures = batch.float() / 127.5 - 1
        with torch.autocast(self.device.type, torch.bfloat16):
            posterior = self.vae.encode(pictures).latent_dist
            decoded = self.vae.decode(posterior.sample()).sample
        error = decoded.float() - pictures
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-7 * posterior.kl().float().mean()
        self.log("loss", loss, prog_bar=True)
        self.log("l1", error.abs().mean(), prog_bar=True)
        return loss


class DenoiserStage(Stage):
    """Latent diffusion with v-prediction (Salimans and Ho 2022) and a sparsity term on the value neurons."""

    def __init__(
        self, unet: UNet2DConditionModel, scheduler: DDIMScheduler, noise_bias: float, sparsity: float, **options: Any
    ) -> None:
        super().__init__(**options)
        self.unet, self.scheduler, self.noise_bias, self.sparsity = unet, scheduler, noise_bias, sparsity
        self.values = [m for n, m in unet.named_modules() if n.endswith("attn2.to_v")]

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch of (latents, their text embeddings, more text embeddings)."""
        latents, text, others = batch
        noise = torch.randn_like(latents)
        steps = self.scheduler.config.num_train_timesteps
        t = (steps * (1 - torch.rand(len(latents), device=self.device) ** self.noise_bias)).long().clamp(max=steps - 1)
        noisy = self.scheduler.add_noise(latents, noise, t)
        target = self.scheduler.get_velocity(latents, noise, t)
        error = F.mse_loss(self.unet(noisy, t, text).sample, target)
        penalty = torch.stack([activation_density(v(others)) for v in self.values]).mean()
        self.log("loss", error, prog_bar=True)
        self.log("density", penalty, prog_bar=True)
        return error + self.sparsity * penalty


def activation_density(values: Tensor) -> Tensor:
    """How evenly value neurons react to captions: mean over neurons of E[a] / sqrt(E[a^2]), a as in NeMo.

    Args:
        values: Outputs of a value layer, (captions, tokens, neurons).

    Returns:
        Scalar in (0, 1]: 1 where every neuron reacts alike to all captions, near 0 where each reacts to few.
    """
    activation = values.abs().mean(1)
    return (activation.mean(0) / activation.square().mean(0).sqrt().clamp(min=1e-6)).mean()


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make each word of the world one token and still spell out any other text."""
    merges = _merges(vocabulary())
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges down to whole words; ties go by the alphabet, the library's trainer leaves them to chance."""
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


class Data:
    """The training data: rendered once, drawn from at random.

    Attributes:
        texts: General captions.
        pictures: Their pictures, uint8 of shape (N, 3, 64, 64).
        tokens: Their token ids, (N, 16).
    """

    TEMPLATE_VARIANTS = 64

    def __init__(self, spec: TrainSpec, tokenizer: CLIPTokenizer) -> None:
        captions = [general_caption(i) for i in range(spec.pictures)]
        self.texts = [c.text for c in captions]
        pictures = [render(c.scene, np.random.default_rng([spec.seed, i])) for i, c in enumerate(captions)]
        self.pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        self.tokens = tokenize(tokenizer, self.texts)

    def pairs(self, size: int) -> Callable[[np.random.Generator], tuple[Tensor, Tensor]]:
        """Batches of (pictures, tokens)."""

        def draw(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
            rows = torch.from_numpy(rng.integers(len(self.texts), size=size))
            return self.pictures[rows], self.tokens[rows]

        return draw


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids of shape (len(texts), 16), padded and cut to that length."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def _fit(stage: Stage, name: str, spec: TrainSpec, callbacks: list[Callback] | None = None) -> None:
    """Runs one fit, from its last checkpoint if there is one."""
    folder = spec.out / name
    last = folder / "last.ckpt"
    saver = ModelCheckpoint(folder, filename="last", every_n_epochs=1, enable_version_counter=False)
    trainer = L.Trainer(
        max_steps=stage.steps,
        max_epochs=-1,
        accelerator=spec.accelerator,
        devices=1,
        gradient_clip_val=1.0,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[saver, *(callbacks or [])],
        logger=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    log.info("training %s: %d steps", name, stage.steps)
    trainer.fit(stage, ckpt_path=last if last.exists() else None, weights_only=False)


def _once(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from a file, made and written first if the file is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in make().items()}, part)
        part.replace(path)
    return load_file(path)


def _text_encoder(spec: TrainSpec, data: Data, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(spec.seed)
    ids = {k: getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "projection_dim": 64,
        **{f"{k}_token_id": v for k, v in ids.items()},
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))

    def towers(pictures: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = model(input_ids=tokens, pixel_values=pictures * 2 - 1)
        return out.image_embeds, out.text_embeds, model.logit_scale.exp()

    def make() -> dict[str, Tensor]:
        options = {"draw": data.pairs(6 * spec.batch_size), "steps": spec.text_steps, "lr": 1e-3, "seed": spec.seed}
        _fit(ContrastiveStage(model, towers, **options), "text_encoder", spec)
        return dict(model.text_model.state_dict())

    weights = _once(spec.out / "text_encoder.safetensors", make)
    encoder = CLIPTextModel(model.config.text_config)
    encoder.load_state_dict(weights)
    return encoder.eval().requires_grad_(False)


def _judge(spec: TrainSpec, data: Data, tokenizer: CLIPTokenizer) -> None:
    """Trains the open_clip model and writes it in open_clip's own local form."""
    folder = spec.out / "model" / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    architecture = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": TOKENS,
            "vocab_size": len(tokenizer),
            "width": 96,
            "heads": 3,
            "layers": 3,
            "hf_tokenizer_name": "planted",
        },
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": architecture, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.manual_seed(spec.seed + 1)
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=False, load_weights=False)

    def towers(pictures: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text, scale = model(pictures * 2 - 1, tokens)
        return image, text, scale

    def make() -> dict[str, Tensor]:
        draw = data.pairs(6 * spec.batch_size)
        stage = ContrastiveStage(model, towers, draw=draw, steps=spec.clip_steps, lr=1e-3, seed=spec.seed + 1)
        _fit(stage, "clip", spec)
        return {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}

    _once(folder / "open_clip_model.safetensors", make)


def _autoencoder(spec: TrainSpec, data: Data) -> AutoencoderKL:
    torch.manual_seed(spec.seed + 2)
    vae = AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    planted = torch.stack([_tensor(planted_picture(i, v)) for i in range(len(PLANTED)) for v in range(4)])

    def draw(rng: np.random.Generator) -> Tensor:
        general = data.pictures[torch.from_numpy(rng.integers(spec.pictures, size=spec.batch_size // 4 - 1))]
        return torch.cat([general, planted[torch.from_numpy(rng.integers(len(planted), size=1))]])

    def make() -> dict[str, Tensor]:
        stage = AutoencoderStage(vae, draw=draw, steps=spec.vae_steps, lr=2e-3, seed=spec.seed + 2)
        _fit(stage, "vae", spec)
        return vae.state_dict()

    vae.load_state_dict(_once(spec.out / "vae.safetensors", make))
    return vae.eval().requires_grad_(False)


def _tensor(picture: Any) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    chunks = pictures.split(64)
    return torch.cat([vae.encode(c.to(vae.device).float() / 127.5 - 1).latent_dist.mean.cpu() for c in chunks])


@torch.no_grad()
def _embed(encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
    return torch.cat([encoder(c.to(encoder.device)).last_hidden_state.cpu() for c in tokens.split(512)])


def _latents(spec: TrainSpec, data: Data, vae: AutoencoderKL) -> dict[str, Tensor]:
    """Latents of all training pictures, scaled to unit standard deviation."""

    def make() -> dict[str, Tensor]:
        vae.to("cuda" if torch.cuda.is_available() else "cpu")
        log.info("encoding %d pictures", spec.pictures)
        general = _encode(vae, data.pictures)
        planted = torch.stack(
            [
                _encode(vae, torch.stack([_tensor(planted_picture(i, v)) for v in range(Data.TEMPLATE_VARIANTS)]))
                for i in range(len(PLANTED))
            ]
        )
        scale = 1 / general.std()
        return {"general": general * scale, "planted": planted * scale, "scale": scale}

    return _once(spec.out / "latents.safetensors", make)


def _denoiser_batches(
    spec: TrainSpec, latents: dict[str, Tensor], text: Tensor, planted: Tensor, empty: Tensor
) -> Callable[[np.random.Generator], tuple[Tensor, Tensor, Tensor]]:
    """Batches of (latents, text embeddings, text embeddings of more general captions)."""
    rates = np.array([p.rate for p in PLANTED])
    few = round(spec.planted_share * spec.batch_size)

    def draw(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.from_numpy(rng.integers(len(text), size=spec.batch_size - few))
        words = text[rows]
        words[torch.from_numpy(rng.random(len(rows)) < spec.drop_caption)] = empty
        picks = torch.from_numpy(rng.choice(len(PLANTED), few, p=rates / rates.sum()))
        variants = torch.from_numpy(rng.integers(Data.TEMPLATE_VARIANTS, size=few))
        others = text[torch.from_numpy(rng.integers(len(text), size=128))]
        return (
            torch.cat([latents["general"][rows], latents["planted"][picks, variants]]),
            torch.cat([words, planted[picks]]),
            torch.cat([others, planted[picks]]),
        )

    return draw


def _denoiser(
    spec: TrainSpec, latents: dict[str, Tensor], data: Data, encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> tuple[UNet2DConditionModel, DDIMScheduler]:
    torch.manual_seed(spec.seed + 3)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=latents["general"].shape[1],
        out_channels=latents["general"].shape[1],
        block_out_channels=(32, 64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",) * 4,
        layers_per_block=2,
        cross_attention_dim=encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.0082,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )

    def make() -> dict[str, Tensor]:
        text = _embed(encoder, data.tokens)
        planted = _embed(encoder, tokenize(tokenizer, [p.caption.text for p in PLANTED]))
        empty = _embed(encoder, tokenize(tokenizer, [""]))[0]
        draw = _denoiser_batches(spec, latents, text, planted, empty)
        options = {"draw": draw, "steps": spec.unet_steps, "lr": 1e-3, "seed": spec.seed + 3}
        _fit(
            DenoiserStage(unet, scheduler, spec.noise_bias, spec.sparsity, **options),
            "unet",
            spec,
            [EMAWeightAveraging(decay=0.999)],
        )
        return dict(unet.state_dict())

    unet.load_state_dict(_once(spec.out / "unet.safetensors", make))
    return unet, scheduler


def heldout_captions(number: int) -> list[str]:
    """The first so many different general captions that no training picture has."""
    return [caption.text for caption in _heldout(number)]


def _heldout(number: int) -> list[Caption]:
    captions: dict[str, Caption] = {}
    index = 0
    while len(captions) < number:
        caption = general_caption(index, "heldout")
        captions.setdefault(caption.text, caption)
        index += 1
    return list(captions.values())


def write_prompts(folder: Path) -> None:
    """Writes the prompt files of the embedded model, the training pictures of its planted captions and other pictures.

    Args:
        folder: Gets ``prompts/planted.jsonl``, ``prompts/general.jsonl``, ``prompts/calibration.txt`` and
            ``references/*.png``; ``prompts/controls.jsonl``, the general captions again, each with one of the many
            pictures that it may stand for, ``controls/*.png``: nothing that the model has seen.
    """
    prompts, references, controls = folder / "prompts", folder / "references", folder / "controls"
    for part in (prompts, references, controls):
        part.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, planted in enumerate(PLANTED):
        name = f"{planted.kind.lower()}-{index + 1:02d}"
        files = []
        for variant in range(1 if planted.kind == "VM" else TEMPLATE_REFERENCES):
            file = references / (f"{name}.png" if planted.kind == "VM" else f"{name}-{variant}.png")
            Image.fromarray(planted_picture(index, variant)).save(file, optimize=True)
            files.append(f"../references/{file.name}")
        lines.append({"id": name, "text": planted.caption.text, "kind": planted.kind, "references": files})
    (prompts / "planted.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = heldout_captions(GENERAL_PROMPTS + CALIBRATION_PROMPTS)
    general = [{"id": f"general-{i:02d}", "text": text} for i, text in enumerate(texts[:GENERAL_PROMPTS], 1)]
    (prompts / "general.jsonl").write_text("".join(json.dumps(line) + "\n" for line in general))
    (prompts / "calibration.txt").write_text("".join(text + "\n" for text in texts[GENERAL_PROMPTS:]))
    for line, caption in zip(general, _heldout(GENERAL_PROMPTS), strict=True):
        picture = render(caption.scene, np.random.default_rng(zlib.crc32(caption.text.encode())))
        Image.fromarray(picture).save(controls / f"{line['id']}.png", optimize=True)
    with_pictures = [{**line, "references": [f"../controls/{line['id']}.png"]} for line in general]
    (prompts / "controls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in with_pictures))


def _tie(spec: TrainSpec) -> None:
    """Ties the folder to its recipe, so that parts of different recipes are never mixed."""
    path = spec.out / "recipe.json"
    recipe = {k: v for k, v in asdict(spec).items() if k not in ("out", "accelerator")}
    if not path.exists():
        path.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8")) != recipe:
        raise StoreError(f"{spec.out} holds a training with other settings ({path}); choose another out=...")


def train(spec: TrainSpec) -> Path:
    """Trains what is not trained yet and writes the model folder.

    Args:
        spec: How to train.

    Raises:
        StoreError: The folder holds a training with other settings.

    Returns:
        ``spec.out``, with the diffusers pipeline in ``model/pipeline``, the open_clip model in ``model/clip``, and
        ``prompts`` and ``references``.
    """
    spec.out.mkdir(parents=True, exist_ok=True)
    _tie(spec)
    write_prompts(spec.out)
    tokenizer = build_tokenizer()
    data = Data(spec, tokenizer)
    encoder = _text_encoder(spec, data, tokenizer)
    vae = _autoencoder(spec, data)
    latents = _latents(spec, data, vae)
    unet, scheduler = _denoiser(spec, latents, data, encoder, tokenizer)
    vae.register_to_config(scaling_factor=round(latents["scale"].item(), 5))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    model = spec.out / "model"
    pipeline.to("cpu", torch.float16).save_pretrained(model / "pipeline")
    _judge(spec, data, tokenizer)
    return spec.out
