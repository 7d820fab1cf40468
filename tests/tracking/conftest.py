"""A small real run that was never tracked."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_bench import read_prompts, resolve
from nemo_bench.cli import main
from small_runs import small


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No mitigation and NeMo on two memorized prompts and a general one."""
    root = tmp_path_factory.mktemp("tracked")
    lists = [read_prompts(resolve(f"package:planted/prompts/{name}.jsonl")) for name in ("planted", "general")]
    lines = [
        {"id": p.id, "text": p.text, "kind": p.kind, "references": [str(r) for r in p.references]}
        for p in (lists[0][0], lists[0][-1], lists[1][0])
    ]
    (root / "three.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [*small(), f"root={root}", f"prompts.files=[{root / 'three.jsonl'}]", "method=none,nemo"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["run", "--json", *words]) == 0
    return root / "default"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(finished, tmp_path / "results" / "default"))


@pytest.fixture
def nemo(run: Path) -> Path:
    """Its cell of NeMo."""
    (cell,) = run.glob("*__nemo__*")
    return cell


@pytest.fixture
def port() -> Iterator[int]:
    """A server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server.getsockname()[1]
