"""What SECURITY.md promises: nothing that is read runs code, and no secret is written; what it names is there."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nemo_bench import Neurons
from nemo_bench.benchmark.stages.score import read_features
from nemo_bench.cli import main
from nemo_bench.config.targets import check_stored
from nemo_bench.diffusion import Source
from nemo_bench.errors import ConfigError, NemoBenchError
from nemo_bench.localization.calibration import load_moments, read_statistics
from nemo_bench.metrics import LPIPS, Inception, OpenClip
from nemo_bench.planted.fit import Fit, Fits
from small_runs import small
from tiny import tiny_pipeline

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "nemo_bench").rglob("*.py"))


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.sprung,)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    """A trap that must not be sprung, though plain unpickling would."""
    trap = Trap(tmp_path / "sprung")
    pickle.loads(pickle.dumps(trap))
    trap.sprung.unlink()
    yield trap
    assert not trap.sprung.exists()


def write(path: Path, content: object, *, zipped: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_results_and_caches_run_no_code(tmp_path: Path, trap: Trap, zipped: bool) -> None:
    reading: dict[str, Callable[[Path], object]] = {
        "statistics.pt": read_statistics,
        "moments.safetensors": load_moments,
        "features.safetensors": lambda path: read_features([path], "real"),
        "neurons.safetensors": Neurons.load,
    }
    for name, read in reading.items():
        with pytest.raises(NemoBenchError, match=name):
            read(write(tmp_path / name, ([trap], [trap]), zipped=zipped))


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_of_models_and_metrics_run_no_code(
    tmp_path: Path, trap: Trap, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    place = tmp_path / "model"
    tiny_pipeline().save_pretrained(place)
    for file in place.glob("unet/*.safetensors"):
        file.unlink()
    write(place / "unet" / "diffusion_pytorch_model.bin", {"weight": trap}, zipped=zipped)
    with pytest.raises(NemoBenchError, match="a file that can run code"):
        Source(str(place)).load()
    clip = write(tmp_path / "clip.pt", {"weight": trap}, zipped=zipped)
    with pytest.raises(NemoBenchError, match="no weights for open_clip"):
        OpenClip("RN50", str(clip)).load()
    lpips = LPIPS("squeeze")
    write(lpips.weights, {"weight": trap}, zipped=zipped)
    with pytest.raises(NemoBenchError, match="LPIPS squeeze"):
        lpips.check()
    pytest.importorskip("torch_fidelity")
    with pytest.raises(NemoBenchError, match="Inception"):
        Inception(str(write(tmp_path / "inception.pth", {"weight": trap}, zipped=zipped))).check()


def test_checkpoints_of_training_run_no_code(tmp_path: Path, trap: Trap) -> None:
    write(tmp_path / "part" / "last.ckpt", {"state_dict": {}, "trap": trap})
    part = nn.Linear(1, 1)
    fit = Fit(
        part,
        lambda rng: torch.zeros(1, 1),
        lambda batch: {"loss": part(batch).sum()},
        name="part",
        steps=1,
        lr=1.0,
        seed=0,
    )
    with pytest.raises(pickle.UnpicklingError):
        Fits(tmp_path, "cpu", []).run(fit, part)


@pytest.mark.parametrize("place", ["method", "method.inner", "metrics.fine.space"])
def test_settings_of_a_results_folder_import_no_code(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_anybody.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    node: dict[str, Any] = {"_target_": "of_anybody.Mine"}
    for part in reversed(place.split(".")[1:]):
        node = {"_target_": "nemo_bench.methods.NoMitigation", part: node}
    with pytest.raises(ConfigError, match=rf"{place}\._target_=of_anybody\.Mine: a results folder names this"):
        check_stored(node, place.split(".")[0], known=())
    with pytest.raises(ConfigError, match=r"\$\{oc.env:HOME\}: settings of a results folder are resolved"):
        check_stored({"_target_": "nemo_bench.methods.NoMitigation", "file": "${oc.env:HOME}"}, "method", known=())


def test_nothing_in_the_package_unpickles_evaluates_or_asks_a_shell() -> None:
    loads = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
                assert not {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & names, path
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load"}, path
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert "shell" not in given, path
            assert given.get("trust_remote_code", "False") == "False", path
            assert given.get("weights_only", "True") == "True", path
            if name in {"torch.load", "trainer.fit"}:
                assert "weights_only" in given, path
                loads += 1
    assert loads >= 4


SECRETS = {
    "WANDB_API_KEY": "cafe" * 10, "HF_TOKEN": "hf_secretsecretsecret", "AWS_SECRET_ACCESS_KEY": "awssecretawssecret",
    "MY_PASSWORD": "passwordpassword",
}  # fmt: skip


def test_no_secret_of_the_environment_is_written(
    tmp_path: Path, prompt_file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    words = [*small(seeds=1, steps=1), "method=none", f"prompts.files=[{prompt_file}]", "prompts.limit=1", "logger=all"]
    assert main(["run", *words, f"root={tmp_path / 'results'}"]) == 0
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.name == "report.html" for path in files)
    texts = {str(path): path.read_bytes().decode(errors="replace") for path in files}
    texts |= dict(zip(("output", "errors"), capfd.readouterr(), strict=True))
    assert not [(name, secret) for name, text in texts.items() for secret in SECRETS.values() if secret in text]
