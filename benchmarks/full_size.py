"""Runs networks of published size, with random weights, through all stages on this machine: time and memory of each.

Run: python benchmarks/full_size.py [sd14 sd21 sdxl sd35_medium] [--size PIXELS] [--method nemo]
       [--refinement sequential] [--dtype bfloat16] [--steps 2] [--folder DIR] [--json]
Nothing is downloaded: every network is built from its published configuration, its weights drawn at random, and saved
as a pipeline folder, which `nemo-bench run` loads as it would load the true one. Tokenizers know few words, and Stable
Diffusion 3.5 goes without T5, whose place zeros take. One prompt, one image; NeMo begins with one neuron a layer.
What images look like says nothing; that every stage ends, and what it needs, is what is measured. Peak memory is that
of the process until the end of the stage.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from load import Usage, command, measure
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from on_disk import read_records
from published_sizes import FULL_SIZE_TRANSFORMERS, FULL_SIZE_UNETS
from tiny import NOISE, tiny_tokenizer

STAGES = "localize", "memorization", "generate", "score"
VOCABULARY = 49_408
PIXELS = 8  # for each latent, along a side
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
OPEN_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


def full_tokenizer() -> CLIPTokenizer:
    """A tokenizer of few words with as many tokens as CLIP's, most of which stand for nothing."""
    tokenizer = tiny_tokenizer(77)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = tokenizer.get_vocab()
    vocab |= {f"<unused {number}>": number for number in range(len(vocab), VOCABULARY)}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], model_max_length=77)


def clip(size: dict[str, int], tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextConfig(**size, **ids, projection_dim=size["hidden_size"], hidden_act="gelu")


def stable_diffusion(unet: str, text: dict[str, int], prediction: str) -> StableDiffusionPipeline:
    tokenizer = full_tokenizer()
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**AUTOENCODER, sample_size=512),
        text_encoder=CLIPTextModel(clip(text, tokenizer)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**FULL_SIZE_UNETS[unet]),
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    tokenizer = full_tokenizer()
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**AUTOENCODER, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(clip(CLIP_L, tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(clip(OPEN_CLIP_G, tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**FULL_SIZE_UNETS["XL"]),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )


def stable_diffusion_3(transformer: str) -> StableDiffusion3Pipeline:
    tokenizer = full_tokenizer()
    quant = {"use_quant_conv": False, "use_post_quant_conv": False}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**FULL_SIZE_TRANSFORMERS[transformer][2]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            **AUTOENCODER, **quant, sample_size=1024, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609
        ),
        text_encoder=CLIPTextModelWithProjection(clip(CLIP_L, tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip(OPEN_CLIP_G, tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


BUILD: dict[str, Any] = {
    "sd14": lambda: stable_diffusion("1.x", CLIP_L, "epsilon"),
    "sd21": lambda: stable_diffusion("2.x", OPEN_CLIP_H, "v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sd35_medium": lambda: stable_diffusion_3("sd35_medium"),
}


def build(name: str, dtype: torch.dtype, size: int | None, folder: Path) -> None:
    """Saves a pipeline of random weights, whose images have sides of ``size`` pixels."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        pipeline = BUILD[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    if size is not None:
        network = getattr(pipeline, "unet", None) or pipeline.transformer
        network.register_to_config(sample_size=size // PIXELS)
    pipeline.to(dtype).save_pretrained(folder)


def words(name: str, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Settings of a run of one prompt, whose images need no weights from elsewhere to be judged."""
    nemo = [
        "method.outliers=false", "method.initial_k=1", "method.gate_threshold=-1", "method.threshold=0.9999",
        f"method.refinement={arguments.refinement}",
    ]  # fmt: skip
    return [
        f"model={name}", f"model.source={folder / name}", "model.local_files_only=true",
        f"model.dtype={arguments.dtype}", f"model.steps={arguments.steps}",
        "model.clip=local-dir:package:planted/model/clip", "model.clip_pretrained=null",
        "prompts=planted", "prompts.files=package:planted/prompts/planted.jsonl", "prompts.limit=1",
        "prompts.calibration=package:planted/prompts/calibration.txt", "prompts.calibration_limit=2",
        "seeds=1", "localize_seeds=2", "batch_size=2", "trainer=cpu", "logger=none",
        f"root={folder}", f"name={name}-run", f"method={arguments.method}",
        *(nemo if arguments.method == "nemo" else ()),
    ]  # fmt: skip


def trial(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Builds one model, runs it, and reads what its records say of every stage."""
    # In a process of its own, since others would count its memory as theirs.
    builder = multiprocessing.get_context("spawn").Process(
        target=build, args=(name, getattr(torch, arguments.dtype), arguments.size, folder / name)
    )
    builder.start()
    builder.join()
    whole = measure(command("run", *words(name, arguments, folder)))
    report = measure(command("report", str(folder / f"{name}-run")))
    (cell,) = {path.parents[1] for path in (folder / f"{name}-run").glob("*/records/generate*")}
    rows: dict[str, Any] = {}
    for stage in STAGES:
        records = read_records(cell, stage).values()
        if failed := [record["failed"] for record in records if record.get("failed")]:
            raise SystemExit(f"{name}: {stage} failed: {failed[0]}")
        costs = [record["cost"] for record in records]
        rows[stage] = {
            "seconds": sum(cost["seconds"] for cost in costs),
            "passes": sum(cost.get("row_passes", 0) for cost in costs),
            "peak_mb": max((cost.get("peak_memory_mb") or 0 for cost in costs), default=0),
        }
    return {"dtype": arguments.dtype, "stages": rows, "run": _usage(whole), "report": _usage(report)}


def _usage(usage: Usage) -> dict[str, float]:
    return {"seconds": usage.seconds, "cpu_seconds": usage.cpu_seconds, "peak_mb": usage.peak_mb * 2**20 / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", default=[*BUILD], metavar="NAME", help=", ".join(BUILD))
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the images; default: that of the model")
    parser.add_argument("--method", choices=("nemo", "none"), default="nemo", help="none: images without localizing")
    parser.add_argument("--refinement", choices=("sequential", "bisect"), default="sequential", help="of NeMo")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="for pipelines and results, one model at a time; default: temporary"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BUILD]:
        parser.error(f"unknown model {unknown[0]}; expected some of {', '.join(BUILD)}")
    found = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.names:
            found[name] = trial(name, arguments, Path(folder))
            shutil.rmtree(Path(folder) / name)
    if arguments.json:
        print(json.dumps(found))
        return
    print("| model | stage | seconds | passes | peak MB |\n| --- | --- | ---: | ---: | ---: |")
    for name, result in found.items():
        for stage, row in result["stages"].items():
            print(f"| {name} | {stage} | {row['seconds']:.1f} | {row['passes']:.0f} | {row['peak_mb']:.0f} |")
        for part in ("run", "report"):
            print(f"| {name} | {part}, in all | {result[part]['seconds']:.1f} | | {result[part]['peak_mb']:.0f} |")


if __name__ == "__main__":
    main()
