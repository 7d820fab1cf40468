"""Models that many tests share; read-only for all of them."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from typing_extensions import override

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["WANDB_MODE"] = "offline"

from nemo_bench import Diffusion, Prompt, read_prompts, resolve
from nemo_bench.benchmark.runner import load_model
from nemo_bench.config import grid
from nemo_bench.diffusion import Similarity
from nemo_bench.localization import Calibration, activation_statistics
from tiny import tiny_pipeline, tiny_texts

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would these tests."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The package's messages of a test as they come, without those for debugging."""
    lines: list[str] = []

    class Collector(logging.Handler):
        @override
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    collector = Collector(logging.INFO)
    logger = logging.getLogger("nemo_bench")
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(collector)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny() -> Diffusion:
    """A tiny model with random weights that looks memorized."""
    return Diffusion(tiny_pipeline(), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))


@pytest.fixture(scope="session")
def tiny_calibration(tiny: Diffusion) -> Calibration:
    """Statistics of the tiny model over forty texts, with a threshold that its prompts pass."""
    texts = tiny_texts(40)
    mean, std = activation_statistics(tiny, [texts[:16], texts[16:]])
    return Calibration(mean, std, 0.5, len(texts))


@pytest.fixture(scope="session")
def planted() -> Diffusion:
    """The embedded model."""
    return load_model(grid(["method=none"])[0].settings.model)


@pytest.fixture(scope="session")
def planted_prompts() -> list[Prompt]:
    """The planted captions."""
    return read_prompts(resolve("package:planted/prompts/planted.jsonl"))


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Three prompts with references, of which one is general."""
    planted = read_prompts(resolve("package:planted/prompts/planted.jsonl"))
    general = read_prompts(resolve("package:planted/prompts/general.jsonl"))
    lines = [
        {"id": p.id, "text": p.text, "kind": p.kind, "references": [str(r) for r in p.references]}
        for p in (planted[0], planted[-1], general[0])
    ]
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
