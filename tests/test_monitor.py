from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn

from nemo_bench import Diffusion, MemorizationMonitor, NemoBenchError, Prompt, read_prompts, resolve
from nemo_bench.detectors import Magnitude, NoiseDifference, watch
from nemo_bench.diffusion import Similarity
from offline_run import OfflineRun
from tiny import tiny_pipeline, tiny_texts

SIMILARITY = Similarity(1.0, ())
TEXTS = tiny_texts(12)


class FineTuning(L.LightningModule):
    """A plain fine-tuning of a UNet, as people write it."""

    def __init__(self, pipeline: StableDiffusionPipeline, steps: int = 4) -> None:
        super().__init__()
        self.unet: nn.Module = pipeline.unet.train().requires_grad_(True)
        self.steps = steps
        self.seen: list[tuple[bool, bool]] = []

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(range(self.steps), batch_size=None)  # type: ignore[arg-type]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((self.unet.training, all(p.requires_grad for p in self.unet.parameters())))
        config: Any = self.unet.config
        latents = torch.randn(2, config.in_channels, config.sample_size, config.sample_size)
        out = self.unet(latents, torch.tensor([3, 500]), torch.ones(2, 16, config.cross_attention_dim)).sample
        return out.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.unet.parameters(), lr=1e-3)


def fit(module: FineTuning, folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        **{"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options},
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    torch.manual_seed(0)
    trainer.fit(module, ckpt_path=options.get("ckpt_path"))
    return trainer


def watching(pipeline: StableDiffusionPipeline, **options: Any) -> MemorizationMonitor:
    given: dict[str, Any] = {"captions": TEXTS[6:], "general": TEXTS[:6], "every": 2, "similarity": SIMILARITY}
    return MemorizationMonitor(pipeline, **given | options)


def test_training_is_the_same_with_the_monitor(tmp_path: Path) -> None:
    plain = FineTuning(tiny_pipeline())
    fit(plain, tmp_path)
    pipeline = tiny_pipeline()
    watched = FineTuning(pipeline)
    monitor = watching(
        pipeline, detectors={"pairs": NoiseDifference(seeds=2), "magnitude": Magnitude(seeds=1, steps=2)}
    )
    fit(watched, tmp_path, monitor)
    assert watched.seen == plain.seen == [(True, True)] * 4
    for name, weight in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], weight)


def test_scores_are_those_of_the_detector_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    pipeline = tiny_pipeline()
    alone = Diffusion(tiny_pipeline(), steps=20, guidance=7.0, similarity=SIMILARITY)
    detectors = {"pairs": NoiseDifference(seeds=2)}
    before, _ = watch(alone, detectors, [Prompt(text, text) for text in TEXTS])
    scores = torch.tensor([found.score for found in before["pairs"]]).double()
    own, others = scores[6:], scores[:6]
    threshold = float(others.mean() + others.std(correction=0) / 2)

    loggers = [CSVLogger(tmp_path, name="csv", version=""), WandbLogger(save_dir=str(tmp_path), offline=True)]
    monitor = watching(pipeline, detectors=detectors, deviations=0.5)
    fit(FineTuning(pipeline), tmp_path, monitor, logger=loggers)
    loggers[1].experiment.finish()

    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["memorization/pairs/mean"]]
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    first = {key.rpartition("/")[2]: float(value) for key, value in rows[0].items() if key.startswith("memorization")}
    assert first == pytest.approx({
        "mean": float(own.mean()),
        "max": float(own.max()),
        "threshold": threshold,
        "flagged": float((own > threshold).double().mean()),
    })  # fmt: skip
    flagged = {flag.caption: flag.score for flag in monitor.flags if flag.step == 0}
    assert flagged == pytest.approx({
        text: float(score) for text, score in zip(TEXTS[6:], own, strict=True) if score > threshold
    })  # fmt: skip
    history = [step["item"] for step in OfflineRun(tmp_path).contents("history")]
    assert sum("memorization/pairs/max" in item for item in history) == 3


def test_memorized_captions_are_flagged_and_stop_the_training(
    planted_prompts: list[Prompt], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Diffusion.load(resolve("package:planted/model/pipeline")).pipeline  # a copy that may be trained
    captions = [prompt.text for prompt in planted_prompts[:3]]
    general = [prompt.text for prompt in read_prompts(resolve("package:planted/prompts/general.jsonl"))]
    monitor = MemorizationMonitor(pipeline, captions, general, every=1, stop_at=0.5, similarity=SIMILARITY)
    trainer = fit(FineTuning(pipeline), tmp_path, monitor)
    assert {flag.caption for flag in monitor.flags} == set(captions)
    assert min(flag.score for flag in monitor.flags) > 0.5 > monitor.flags[0].threshold
    assert trainer.global_step < 4
    assert "step 0: 3 of 3 captions look memorized" in caplog.text
    assert "the training stops" in caplog.text


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_frozen_parts_may_have_another_dtype(tmp_path: Path, precision: str) -> None:
    pipeline = tiny_pipeline()
    pipeline.text_encoder.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    monitor = watching(pipeline, detectors={"magnitude": Magnitude(seeds=1, steps=2)}, deviations=0.0)
    fit(FineTuning(pipeline), tmp_path, monitor, precision=precision)
    assert monitor.flags


def test_scores_that_are_not_finite_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_pipeline()
    monitor = watching(pipeline, detectors={"magnitude": Magnitude(seeds=1, steps=2)}, stop_at=0.1)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(torch.nan)
    fit(FineTuning(pipeline, steps=1), tmp_path, monitor)
    assert not monitor.flags
    assert "magnitude can't tell: of 6 captions 0 have a finite score, of 6 general ones 0" in caplog.text


def test_flags_are_kept_in_checkpoints_and_a_step_is_checked_once(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    first = watching(pipeline, deviations=0.0, detectors={"pairs": NoiseDifference(seeds=2)})
    trainer = fit(FineTuning(pipeline), tmp_path, first, enable_checkpointing=False)
    assert {flag.step for flag in first.flags} == {0, 2, 4}
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    pipeline = tiny_pipeline()
    second = watching(pipeline, deviations=0.0, detectors={"pairs": NoiseDifference(seeds=2)})
    resumed = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[second],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    resumed.fit(FineTuning(pipeline), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert second.flags[: len(first.flags)] == first.flags
    steps = [flag.step for flag in second.flags]
    assert steps == sorted(steps)
    assert set(steps) == {0, 2, 4, 6, 8}
    assert len({(flag.step, flag.caption) for flag in second.flags}) == len(second.flags)


def test_two_monitors_watch_one_training(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    detectors = {"pairs": NoiseDifference(seeds=2)}
    both = [watching(pipeline, detectors=detectors, every=3, deviations=0.0, name=name) for name in ("one", "two")]
    assert both[0].state_key != both[1].state_key
    fit(FineTuning(pipeline), tmp_path, *both, logger=CSVLogger(tmp_path, name="csv", version=""))
    assert {flag.step for flag in both[0].flags} == {0, 3}
    assert both[0].flags == both[1].flags
    head = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0]
    assert {"one/pairs/mean", "two/pairs/mean"} <= set(head.split(","))


def test_a_sample_is_drawn_anew_at_each_check(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    monitor = watching(pipeline, captions=tiny_texts(64)[12:], sample=3, deviations=0.0)
    draws = [monitor._sample(step) for step in (0, 2, 0)]
    assert [len(draw) for draw in draws] == [3, 3, 3]
    assert draws[0] == draws[2] != draws[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": []}, "given 0 and 6"),
        ({"general": TEXTS[:1]}, "given 6 and 1"),
        ({"general": TEXTS[:7]}, f"'{TEXTS[6]}' is a training caption and a general one"),
        ({"every": 0}, "every=0"),
        ({"stop_at": 1.5}, "stop_at=1.5"),
        ({"guidance": 1.0, "detectors": {"all": Magnitude()}}, "watches guided sampling"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NemoBenchError, match=message):
        watching(tiny_pipeline(), **options)


def _train(folder: Path, **options: Any) -> list[list[Any]]:
    pipeline = tiny_pipeline()
    monitor = watching(pipeline, deviations=0.0, detectors={"pairs": NoiseDifference(seeds=2)})
    fit(FineTuning(pipeline), folder, monitor, **options)
    return [[flag.caption, flag.score, flag.threshold] for flag in monitor.flags if flag.step == 0]


def test_two_ranks_share_the_captions_and_flag_the_same(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent / "helpers"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, __file__, tmp_path], check=True, timeout=180, env=environment)
    ranks = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    alone = _train(tmp_path)
    assert [caption for caption, _, _ in ranks[0]] == [caption for caption, _, _ in alone]
    assert len(alone) >= 1
    for shared, own in zip(ranks[0], alone, strict=True):
        assert shared[1:] == pytest.approx(own[1:], abs=1e-5)


if __name__ == "__main__":
    flags = _train(Path(sys.argv[1]), devices=2, strategy="ddp")
    (Path(sys.argv[1]) / f"rank-{os.environ.get('LOCAL_RANK', '0')}").write_text(json.dumps(flags))
