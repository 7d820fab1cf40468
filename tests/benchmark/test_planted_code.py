"""Results folders of other people: what they name is never called, imported or looked up, by any command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.cli import main
from nemo_bench.config import build
from nemo_bench.errors import ConfigError
from on_disk import read_json

READING = {
    "score": lambda folder: ["score", str(folder), "trainer=cpu"],
    "audit": lambda folder: ["audit", str(folder), "--cell", "none", "steps=1", "samples=1", "images=1", "limit=1"],
    "report": lambda folder: ["report", str(folder)],
    "track": lambda folder: ["track", str(folder), "logger=csv"],
}


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that planted code would write; a module that writes it where it is imported lies on the path."""
    mark = tmp_path / "executed"
    module = tmp_path / "modules" / "trap_at_import.py"
    module.parent.mkdir()
    module.write_text(f"open({str(mark)!r}, 'w').close()\nclass Trap: pass\n")
    monkeypatch.syspath_prepend(str(module.parent))
    return mark


def nodes(mark: Path) -> list[Any]:
    """Nodes that would write the mark, or read what is none of theirs, wherever they were taken at their word."""
    shell = f"touch {mark}"
    return [
        {"_target_": "subprocess.getoutput", "cmd": shell},
        {"_target_": "subprocess.Popen", "args": shell, "shell": True},
        {"_target_": "nemo_bench.benchmark.runner.subprocess.Popen", "args": shell, "shell": True},
        {"_target_": "trap_at_import.Trap"},
        {"_target_": "nemo_bench.cli.main", "arguments": ["--help"]},
        {"_target_": "nemo_bench.metrics.TrainingImage", "space": {"_target_": "subprocess.getoutput", "cmd": shell}},
        {"_target_": "nemo_bench.metrics.TrainingImage", "_partial_": True},
        {"_target_": "nemo_bench.metrics.TrainingImage", "_args_": [shell]},
        {"_target_": "nemo_bench.metrics.SSCD", "file": "${oc.env:HOME}"},
        {"_target_": "nemo_bench.records.store.Store", "folder": str(mark)},
        "${oc.env:HOME}",
        {"_target_": ["subprocess", "getoutput"]},
    ]


def cell(folder: Path) -> Path:
    (path,) = folder.glob("*__none__*")
    return path


def plant(path: Path, change: Any) -> None:
    content = read_json(path)
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("number", range(12))
def test_a_planted_node_is_refused_before_anything_is_called(
    folder: Path, trap: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    node = nodes(trap)[number]
    env = cell(folder) / "env.json"
    before = env.read_text()
    plant(env, lambda content: content[-1]["settings"]["metrics"].update(planted=node))
    assert main(READING["score"](folder)) == 1
    assert "planted" in capsys.readouterr().err
    env.write_text(before)
    plant(env, lambda content: content[-1]["settings"].update(method=node))
    assert main(READING["audit"](folder)) == 1
    assert "method" in capsys.readouterr().err
    assert not trap.exists()


def everywhere(node: Any, planted: Any) -> Any:
    """A JSON document with the planted node in place of everything that is an object below the first level."""
    if isinstance(node, dict):
        return {**{key: everywhere(value, planted) for key, value in node.items()}, "planted": planted}
    return [*(everywhere(value, planted) for value in node), planted] if isinstance(node, list) else node


@pytest.mark.parametrize("command", READING)
def test_nodes_planted_in_every_file_execute_nothing(folder: Path, trap: Path, command: str) -> None:
    files = [path for path in folder.parent.rglob("*") if path.suffix in (".json", ".jsonl") and path.is_file()]
    assert len(files) > 20
    for number, path in enumerate(files):
        planted = nodes(trap)[number % 4]
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        path.write_text("\n".join(json.dumps(everywhere(json.loads(line), planted)) for line in lines) + "\n")
    assert main(READING[command](folder)) in (0, 1)
    assert not trap.exists()


def test_a_class_of_another_kind_is_refused_before_it_is_called(trap: Path) -> None:
    shell = f"touch {trap}"
    for target in ("subprocess.getoutput", "subprocess.Popen", "nemo_bench.metrics.SSIM", "builtins.dict"):
        with pytest.raises(ConfigError, match=r"method\._target_=.*expected a class of nemo_bench\.methods"):
            build({"_target_": target, "cmd": shell}, "method")
    node = {"_target_": "nemo_bench.metrics.TrainingImage", "space": {"_target_": "subprocess.Popen", "args": shell}}
    with pytest.raises(ConfigError, match=r"metrics\.x\.space\._target_=subprocess\.Popen: expected a class of nemo"):
        build(node, "metrics.x")
    assert not trap.exists()


def test_a_class_named_by_a_file_of_the_user_is_called(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = tmp_path / "own"
    (modules / "conf" / "metrics").mkdir(parents=True)
    (modules / "own_metric.py").write_text(
        "from nemo_bench.metrics import NeuronCount\nclass Mine(NeuronCount):\n    pass\n"
    )
    (modules / "conf" / "metrics" / "mine.yaml").write_text("mine: {_target_: own_metric.Mine}\n")
    monkeypatch.syspath_prepend(str(modules))
    words = ["metrics=mine", "trainer=cpu"]
    assert main(["score", str(folder), *words, "--conf", str(modules / "conf")]) == 0
    assert read_json(cell(folder) / "metrics.json")["metrics"].keys() == {"mine"}
    capsys.readouterr()
    assert main(READING["score"](folder)) == 1
    assert "give --conf DIR with the file that names it" in capsys.readouterr().err
    assert main([*READING["score"](folder), "--conf", str(modules / "conf")]) == 0
