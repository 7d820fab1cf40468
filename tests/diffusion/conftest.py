"""Places that pipelines are loaded from, read-only for all tests."""

from __future__ import annotations

import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import save_file

from checkpoints import original_layout
from tiny import tiny_pipeline

COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "model"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Downloaded models, with some/model at two commits, as the hub's client lays them out."""
    model = tmp_path / "models--some--model"
    for commit, seed in zip(COMMITS, (0, 1), strict=True):
        tiny_pipeline(seed).save_pretrained(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMITS[0])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return model


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file(original_layout(tiny_pipeline()), path)
    return path
