"""Settings: everything in conf/ works, and everything wrong is said before anything is loaded."""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_bench.benchmark.plan import source_of
from nemo_bench.config import (
    GROUPS,
    CellConfig,
    PromptSettings,
    build,
    describe_options,
    detector_grid,
    explain_option,
    grid,
    logger_settings,
    options,
    overridden,
    resolve,
    short,
)
from nemo_bench.config.about import class_text
from nemo_bench.config.overrides import read, shell_word
from nemo_bench.errors import ConfigError
from nemo_bench.methods import Method, NeMo, NoMitigation, OtherNeurons, RandomNeurons, SharedNeurons
from nemo_bench.metrics import BenchMetric

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml") if file.parent.name != "sweeps")

MINE = """
from __future__ import annotations
from contextlib import nullcontext
from nemo_bench.methods import Method

class Mine(Method):
    title = "Mine"
    summary = "a method of one's own"
    citation = "me"

    def __init__(self, strength: float, words: list[str] | None = None):
        self.strength, self.words = strength, words

    def apply(self, model, batch):
        return nullcontext(batch)
"""


def one(*overrides: str, conf: Path | None = None) -> CellConfig:
    (choice,) = grid(["method=none", *overrides], conf)
    return choice


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for --conf with a method whose class is on the path."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine_of_test_config.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "mine_of_test_config", raising=False)
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("_target_: mine_of_test_config.Mine\nstrength: 1.5\n")
    return tmp_path / "conf"


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_file_composes_and_builds(group: str, name: str) -> None:
    choice, *_ = grid([f"{group}={name}", *([] if group == "method" else ["method=none"])])
    assert choice.names[group] == name
    method = build(choice.settings.method, "method")
    assert isinstance(method, Method)
    assert isinstance(method.source, Method | None)
    metrics = [build(node, f"metrics.{key}") for key, node in choice.settings.metrics.items()]
    assert metrics
    assert all(isinstance(metric, BenchMetric) for metric in metrics)


def test_every_group_has_files_and_every_file_a_group() -> None:
    assert {group for group, _ in FILES} == set(GROUPS)
    assert {group: options(group) for group in GROUPS} == {
        group: [name for folder, name in FILES if folder == group] for group in GROUPS
    }


def test_without_a_method_nemo_is_compared_with_its_controls_and_its_edits() -> None:
    choices = grid(["seeds=3"])
    assert [choice.names["method"] for choice in choices] == ["none", "random", "nemo", "other_prompt", "one_edit"]
    kinds = [NoMitigation, RandomNeurons, NeMo, OtherNeurons, SharedNeurons]
    assert [type(build(c.settings.method, "method")) for c in choices] == kinds
    assert all(choice.settings.seeds == 3 for choice in choices)
    assert set(choices[0].names) == set(GROUPS) - {"experiment", "detector"}


def test_lists_are_multiplied_out_and_the_method_changes_fastest() -> None:
    choices = grid(["method=nemo,none", "model.steps=range(5,7)", "name=x"])
    cells = [(choice.settings.model.steps, choice.names["method"]) for choice in choices]
    assert cells == [(5, "nemo"), (5, "none"), (6, "nemo"), (6, "none")]
    assert [c.settings.seeds for c in grid(["seeds=2,1", "method=none"])] == [2, 1]
    assert {choice.settings.name for choice in choices} == {"x"}


def test_overrides_reach_arguments_at_every_depth() -> None:
    (choice,) = grid(["method=random", "method.seed=7", "method.source.theta=4", "model.similarity.betas=[0.5,0.5]"])
    method = build(choice.settings.method, "method")
    assert isinstance(method, RandomNeurons)
    assert method.seed == 7
    assert isinstance(method.source, NeMo)
    assert method.source.settings.theta == 4
    assert choice.settings.model.similarity.betas == [0.5, 0.5]


def test_an_experiment_overrides_and_is_overridden() -> None:
    smoke = one("experiment=smoke", "seeds=9")
    assert smoke.names["experiment"] == "smoke"
    assert (smoke.settings.seeds, smoke.settings.model.steps, smoke.settings.name) == (9, 8, "smoke")
    assert one().settings.model.steps != 8


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_is_cells_that_differ_and_says_what_it_shows(name: str) -> None:
    choices = grid([f"experiment={name}"])
    settings = [choice.settings for choice in choices]
    assert all(a != b for a, b in itertools.combinations(settings, 2))
    assert {s.name for s in settings} == {name}
    assert all(isinstance(build(s.method, "method"), Method) for s in settings)
    (listed,) = (entry for entry in describe_options("experiment") if entry["name"] == name)
    assert listed["summary"] == settings[0].summary != ""


STUDY = """# @package _global_
name: study
seeds: 2
grid:
  - method=none
  - method=nemo method.theta=3,4 'seeds=7'
  - model.steps=5,6
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder for --conf with an experiment that has a grid."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "study.yaml").write_text(STUDY)
    return tmp_path


def cells_of(overrides: str, conf: Path) -> list[tuple[str, float | None, int, int]]:
    """Method, theta, seeds and steps of each cell."""
    return [
        (c.names["method"], c.settings.method.get("theta"), c.settings.seeds, c.settings.model.steps)
        for c in grid(overrides.split(), conf)
    ]


def test_the_lines_of_an_experiment_are_multiplied_out_one_by_one(study: Path) -> None:
    steps = one().settings.model.steps
    assert cells_of("experiment=study", study) == [
        ("none", None, 2, steps),
        ("nemo", 3, 7, steps),
        ("nemo", 4, 7, steps),
        *(
            (method, theta, 2, n)
            for n in (5, 6)
            for method, theta in (
                ("none", None),
                ("random", None),
                ("nemo", 5),
                ("other_prompt", None),
                ("one_edit", None),
            )
        ),
    ]
    assert cells_of("experiment=null", study) == cells_of("", study)


def test_what_is_typed_wins_over_the_lines_of_an_experiment(study: Path) -> None:
    # A method takes the place of the method's settings too; lines that then are the same count once.
    steps = one().settings.model.steps
    assert cells_of("experiment=study method=none seeds=3", study) == [
        ("none", None, 3, steps),
        ("none", None, 3, 5),
        ("none", None, 3, 6),
    ]
    typed = cells_of("experiment=study model.steps=8,9 seeds=1", study)
    assert {(seeds, n) for _, _, seeds, n in typed} == {(1, 8), (1, 9)}
    assert [c[:2] for c in typed if c[3] == 9] == [
        ("none", None),
        ("nemo", 3),
        ("nemo", 4),
        ("random", None),
        ("nemo", 5),
        ("other_prompt", None),
        ("one_edit", None),
    ]


@pytest.mark.parametrize(
    ("grid_", "message"),
    [
        ("[method=nemo method.thetta=3]", "unknown key 'method.thetta'.*Did you mean 'theta'"),
        ('["method=\'nemo"]', "can't read \"method='nemo\" in the grid of an experiment"),
        ("{method.theta: 3}", "experiment=study: grid={'method.theta': 3}: expected a list"),
        ("[nemo]", "can't read an override"),
    ],
)
def test_mistakes_in_the_grid_of_an_experiment_are_named(study: Path, grid_: str, message: str) -> None:
    (study / "experiment" / "study.yaml").write_text(f"# @package _global_\ngrid: {grid_}\n")
    with pytest.raises(ConfigError, match=message):
        grid(["experiment=study"], study)


def test_prompts_named_by_files_inherit_nothing_of_a_list() -> None:
    """The embedded model's captions calibrated Stable Diffusion, and nobody said so."""
    for words in (["prompts.files=mine.csv"], ["prompts=coco", "prompts.files=[a.csv,b.csv]"]):
        found = one(*words).settings.prompts
        assert found == PromptSettings(files=found.files)
    typed = one("prompts.files=a.csv", "prompts.calibration=b.csv", "prompts.limit=3", "prompts.shared_from=c.csv")
    expected = PromptSettings(files=["a.csv"], calibration="b.csv", limit=3, shared_from=["c.csv"])
    assert typed.settings.prompts == expected
    assert one("prompts=coco", "prompts.limit=3").settings.prompts.calibration == "data/additional_laion_prompts.csv"


def test_prompts_named_by_files_in_an_experiment_inherit_nothing_either(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "study.yaml").write_text("# @package _global_\nprompts: {files: [a.csv], limit: 3}\n")
    written = one("experiment=study", "prompts.calibration=c.csv", conf=tmp_path)
    assert written.settings.prompts == PromptSettings(["a.csv"], calibration="c.csv", limit=3)
    assert written.names["prompts"] == "a"
    assert one("experiment=study", "prompts.files=b.csv", conf=tmp_path).settings.prompts == PromptSettings(["b.csv"])


def test_metrics_can_be_added_and_left_out() -> None:
    names = set(one().settings.metrics)
    again = one("~metrics.ssim", "+metrics.again._target_=nemo_bench.metrics.MemorizationScore").settings.metrics
    assert set(again) == names - {"ssim"} | {"again"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("sedes=3", "unknown key 'sedes'.*Did you mean 'seeds'"),
        ("model.step=3", "unknown key 'model.step': there is no 'step' in 'model'. Did you mean 'steps'"),
        ("++model.step=3", "unknown key 'model.step': there is no 'step' in 'model'. Did you mean 'steps'"),
        ("prompts.files.0=x.jsonl", "unknown key 'prompts.files.0': there is no '0' in 'prompts.files'"),
        ("prompts.files.x=1", "unknown key 'prompts.files.x'"),
        ("method=nemo method.thetta=3", "unknown key 'method.thetta'.*Did you mean 'theta'"),
        ("method=random method.source.thetta=3", "unknown key 'method.source.thetta'.*Did you mean 'theta'"),
        ("+seedz=3", "seedz"),
        ("model=plantet", "unknown model 'plantet'. Did you mean 'planted'.*Choices: .*planted"),
        ("method=nemmo", "unknown method 'nemmo'. Did you mean 'nemo'.*Choices: .*none"),
        ("experiment=smoky", "unknown experiment 'smoky'. Did you mean 'smoke'"),
        ("model.steps=1.5", "model.steps=1.5"),
        ("model.similarity.betas=3", "model.similarity.betas=3: expected a list, in brackets"),
        ("prompts.memorized=a.csv", "prompts.memorized: a.csv is none of prompts.files="),
        ("seeds=two", "seeds=two: expected a whole number"),
        ("model.local_files_only=maybe", "model.local_files_only=maybe: expected true or false"),
        ("method=nemo method.theta=x", "method.theta=x: expected a number, given 'x'"),
        ("method=random method.seed=1.5", "method.seed=1.5: expected a whole number, given 1.5"),
        ("method=nemo method.neurons=refind", "method.neurons=refind: expected one of refined, initial"),
        ("method=nemo method.theta=0.5", "theta=0.5; expected more than theta_min=1.0"),
        ("seeds=0", "seeds=0: expected greater than or equal to 1"),
        ("seeds=9999999999", "seeds=9999999999: expected less than or equal to 2147483647"),
        ("batch_size=0", "batch_size=0: expected greater than or equal to 1 or 'auto'"),
        ("batch_size=9999999999", "batch_size=9999999999: expected less than or equal to 2147483647 or 'auto'"),
        ("localize_seeds=1", "localize_seeds=1: expected greater than or equal to 2"),
        ("model.guidance=-1", "model.guidance=-1: expected greater than or equal to 0"),
        ("model.guidance=nan", "model.guidance=nan"),
        ("model.dtype=float8", "model.dtype=float8: .*Choices: bfloat16, float16, float32"),
        ("model.layers=al", "model.layers=al: .*Did you mean 'all'"),
        ("name=../up", "name=../up: expected letters"),
        ("seeds", "can't read an override .*seeds.*write key=value"),
        ("seeds=[1", "can't read an override"),
        ("prompts.files=[it's.csv]", r"""can't read .* into quotes: 'prompts.files=\["it'"'"'s.csv"\]'"""),
        ("+method.file=a(1.csv", r"""into quotes: '\+method.file="a\(1.csv"'"""),
        ("grid=[nemo]", "grid belongs into the file of an experiment"),
        ("method=null", "method"),
        ("model=null", "model"),
        ("method._target_=nemo_bench.methods.Nope", "method._target_=nemo_bench.methods.Nope: can't be imported"),
        ("method._target_=nemo_bench.methods", "method._target_=nemo_bench.methods"),
        ("method._target_=nemo_bench.methods.Method", "method"),
        ("metrics.ssim=3", "metrics.ssim: expected _target_"),
        ("+metrics.ssim.window=3", "metrics.ssim.*window"),
        ("method=random ~method.source", "RandomNeurons also needs source"),
        ("method=nemo +method.extra=1", "unknown key 'method.extra'"),
    ],
)
def test_what_is_wrong_is_named(overrides: str, message: str) -> None:
    words = overrides.split()
    with pytest.raises(ConfigError, match=message):
        grid(words if "method=" in overrides else ["method=none", *words])


def test_no_experiment_can_be_said() -> None:
    # run.yaml says it, so a command line may too.
    assert "experiment" not in one("experiment=null").names


def test_a_method_of_ones_own(own: Path) -> None:
    none, mine = grid(["method=none,mine"], own)
    assert [none.names["method"], mine.names["method"]] == ["none", "mine"]
    method = build(mine.settings.method, "method")
    assert isinstance(method, Method)
    assert (type(method).__name__, vars(method)) == ("Mine", {"strength": 1.5, "words": None})
    assert options("method", own) == sorted([*options("method"), "mine"])
    assert "mine" not in options("method")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("_target_: mine_of_test_config.Mine", "method: mine_of_test_config.Mine also needs strength"),
        ("_target_: mine_of_test_config.Mine\nstrenght: 1", "'method.strenght'. Did you mean 'strength'"),
        ("_target_: mine_of_test_config.Mine\nstrength: much", "method.strength=much: expected a number"),
        ("_target_: mine_of_test_config.Mine\nstrength: 1\nwords: [a, 2]", r"method.words=\['a', 2\]: expected list"),
        ("_target_: mine_of_test_config.Other", "can't be imported"),
        ("strength: 1", "method: expected _target_"),
        ("_target_: [", "mine"),
    ],
)
def test_mistakes_in_a_method_of_ones_own_are_named(own: Path, yaml: str, message: str) -> None:
    (own / "method" / "mine.yaml").write_text(yaml + "\n")
    with pytest.raises(ConfigError, match=message):
        grid(["method=mine"], own)


def test_a_missing_folder_of_ones_own_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--conf .*gone is no folder"):
        grid(["method=none"], tmp_path / "gone")


@pytest.mark.parametrize("name", ["my conf", "a,b", "größe"])
def test_a_folder_of_ones_own_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "method").mkdir(parents=True)
    (tmp_path / name / "method" / "mine.yaml").write_text("_target_: nemo_bench.methods.NoMitigation\n")
    (tmp_path / name / "method" / "._mine.yaml").write_text("left by a system")
    (choice,) = grid(["method=mine"], tmp_path / name)
    assert choice.names["method"] == "mine"
    assert [option for option in options("method", tmp_path / name) if "mine" in option] == ["mine"]


@pytest.mark.parametrize("group", GROUPS)
def test_options_are_described(group: str) -> None:
    entries = describe_options(group)
    assert [list(entry) for entry in entries] == [["group", "name", "summary", "citation"]] * len(entries)
    assert {entry["group"] for entry in entries} == {group}
    assert all(isinstance(value, str) for entry in entries for value in entry.values())
    json.dumps(entries)
    if group == "metrics":
        files = {name: one(f"metrics={name}").settings.metrics for name in options(group)}
        assert [entry["name"] for entry in entries] == [f"{name}/{key}" for name, node in files.items() for key in node]
    else:
        assert [entry["name"] for entry in entries] == options(group)
    if group in ("model", "method", "detector", "prompts", "metrics"):
        assert all(entry["summary"] for entry in entries)


def test_options_of_ones_own_are_described(own: Path) -> None:
    assert {"group": "method", "name": "mine", "summary": "a method of one's own", "citation": "me"} in (
        describe_options("method", own)
    )


def test_an_unknown_group_is_an_error() -> None:
    for ask in (options, describe_options):
        with pytest.raises(ConfigError, match=r"unknown group 'methods'\. Did you mean 'method'"):
            ask("methods")


def test_paths_in_the_package_are_found() -> None:
    found = one().settings.prompts
    assert all(Path(resolve(file)).is_file() for file in [*found.files, str(found.calibration)])
    assert resolve("local-dir:package:planted").startswith("local-dir:")
    assert Path(resolve("local-dir:package:planted").removeprefix("local-dir:")).is_dir()
    assert resolve("some/where.csv") == "some/where.csv"


@dataclass
class Training:
    steps: int = 3
    rate: float = 0.5
    name: str = "a"


def test_settings_of_a_training_are_typed() -> None:
    assert overridden(["name=1_0", "steps=1_0"], Training) == Training(10, name="1_0")
    assert overridden(["steps=5"], Training) == Training(5, 0.5)
    assert overridden([], Training) == Training()
    for word, message in (
        ("stepz=5", "unknown setting 'stepz=5'.*Did you mean 'steps'"),
        ("steps", "unknown setting 'steps'; write key=value"),
        ("steps=many", "steps=many: expected a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            overridden([word], Training)


def test_a_setting_goes_to_the_methods_that_have_it_and_to_the_source_of_a_control() -> None:
    none, random, nemo = grid(["method=none,random,nemo", "method.theta=4"])
    assert nemo.settings.method["theta"] == random.settings.method["source"]["theta"] == 4
    assert "theta" not in none.settings.method
    assert grid(["method=none,random", "method.theta=4"])[1].settings.method["source"]["theta"] == 4
    for words, message in (
        (["method=none,nemo", "method.tetha=4"], "unknown key 'method.tetha': none of the methods .* 'theta'"),
        (["method=none,random", "method.theta=abc"], "^method.theta=abc: expected a number, given 'abc'"),
        (["method=random", "method.source.theta=abc"], "^method.source.theta=abc: expected a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            grid(words)


def test_an_option_is_explained_by_its_file_and_its_class() -> None:
    text = explain_option("method", "nemo")
    assert "theta_min: 1.0" in text
    assert "theta_min: The search ends before it reaches this theta" in text
    assert "guidance: 7" in explain_option("model", "sd14")
    with pytest.raises(ConfigError, match=r"unknown model 'sd1'.*Choices"):
        explain_option("model", "sd1")


def test_a_metric_is_explained_by_every_file_that_has_it() -> None:
    text = explain_option("metrics", "sscd")
    head = text.split("\n")
    assert [line for line in head if line.startswith("# metrics=")] == [
        "# metrics=full",
        "# metrics=membench",
        "# metrics=wen",
    ]
    assert head[1].startswith("# SSCD disc mixup to training image: ")
    assert "_target_: nemo_bench.metrics.TrainingImage" in text
    assert "threshold: 0.15" in explain_option("metrics", "default")
    with pytest.raises(ConfigError, match=r"unknown metrics 'scsd'. Did you mean 'sscd'"):
        explain_option("metrics", "scsd")


def test_sweeps_are_listed_and_explained() -> None:
    entries = describe_options("sweeps")
    assert [entry["name"] for entry in entries] == sorted(path.stem for path in (CONF / "sweeps").glob("*.yaml"))
    assert entries[0]["summary"] == "Every method at several scales of guidance: a grid, one cell a trial."
    assert "method: bayes" in explain_option("sweeps", "theta")


@pytest.mark.parametrize("group", ["method", "detector"])
@pytest.mark.parametrize("name", ["title", "summary", "citation"])
def test_what_is_read_of_a_class_without_importing_it_is_what_it_says(group: str, name: str) -> None:
    for option in options(group):
        choice = one(f"{group}={option}") if group != "method" else grid([f"method={option}"])[0]
        node = getattr(choice.settings, group)
        assert class_text(node["_target_"], name) == getattr(get_object(node["_target_"]), name)


def test_a_source_is_said_in_a_few_words() -> None:
    found = {short(entry["citation"]) for entry in describe_options("method")}
    assert found >= {"Wen et al. 2024", "Ren et al. 2024", ""}
    assert short("Heusel et al. 2017") == "Heusel et al. 2017"
    assert all("@" not in short(entry["citation"]) for entry in describe_options("detector"))


def test_a_listing_needs_no_composition_and_no_torch() -> None:
    code = (
        "import sys, nemo_bench.config.composition as c; from nemo_bench.cli import main; done = []\n"
        "compose = c.compose; c.compose = lambda *a, **k: (done.append(1), compose(*a, **k))[1]\n"
        "for words in (['ls'], ['ls', 'method'], ['ls', 'model'], ['ls', 'sweeps']): assert main(words) == 0\n"
        "print(len(done), [m for m in ('torch', 'diffusers', 'matplotlib', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_settings_of_the_logger_alone() -> None:
    assert logger_settings([]).wandb
    assert (logger_settings(["logger=csv"]).wandb, logger_settings(["logger=csv"]).csv) == (False, True)
    both = logger_settings(["logger.project=mine", "logger.tensorboard=true"])
    assert (both.wandb, both.tensorboard, both.csv, both.project) == (True, True, False, "mine")
    every = logger_settings(["logger=all"])
    assert (every.wandb, every.csv, every.tensorboard) == (True, True, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=3"], "unknown setting 'seeds'; only logger"),
        (["logger=wandbb"], "Did you mean 'wandb'"),
        (["logger.modus=online"], "Did you mean 'mode'"),
        (["logger.mode=on"], "Choices: offline, online"),
        (["logger.timeout=0"], "logger.timeout=0: expected greater than or equal to 1"),
        (["logger=csv,wandb"], "logger=all takes every logger"),
    ],
)
def test_wrong_settings_of_the_logger_are_explained(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        logger_settings(words)


PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    # Jeon et al. 2025, Han et al. 2025, Asthana and Belagiannis 2026: settings of their public code.
    ("sail", "sd14"): {"target": None, "alpha": 0.05, "form": "noise"},
    ("sail", "sd20"): {"target": 5.0, "alpha": 0.01, "form": "score"},
    ("adjusted_noise", "sd14"): {"rounds": 2, "radius": 50.0, "rate": 0.7, "timestep": 900.0},
    ("adjusted_noise", "sd20"): {"rounds": 4, "radius": 30.0, "rate": 0.7, "timestep": 917.449},
    ("optimized_noise", "sd14"): {"target": 0.9, "rate": 0.01},
    ("optimized_noise", "sd21"): {"target": 10.0, "rate": 0.1},
    ("anisotropy_optimization", "sd15"): {"norm_weight": 1.0, "angle_weight": 2.0},
    ("anisotropy_optimization", "sd20"): {"norm_weight": 1.0, "angle_weight": 0.1, "angle_of": "prediction"},
    ("anisotropy_optimization", "realistic_vision"): {"norm_weight": 2.0, "angle_weight": 1.0},
}


@pytest.mark.parametrize(("method", "model"), PUBLISHED)
def test_the_settings_published_for_the_family_of_a_model_are_chosen(method: str, model: str) -> None:
    (choice,) = grid([f"method={method}", f"model={model}"])
    assert {key: choice.settings.method[key] for key in PUBLISHED[method, model]} == PUBLISHED[method, model]
    assert [found.known for found in choice.families] == [True]
    assert "families" not in choice.settings.method


@pytest.mark.parametrize(("model", "weights"), [("sd14", (1, 2)), ("sd20", (1, 0.1)), ("realistic_vision", (2, 1))])
def test_detectors_take_the_settings_of_a_family_too(model: str, weights: tuple[float, float]) -> None:
    (choice,) = detector_grid([f"model={model}", "detector=anisotropy"])
    assert (choice.settings.detector["norm_weight"], choice.settings.detector["angle_weight"]) == weights


def test_a_setting_of_ones_own_wins_over_that_of_the_family(study: Path) -> None:
    (typed,) = grid(["method=sail", "model=sd20", "method.alpha=0.05"])
    assert (typed.settings.method["alpha"], typed.settings.method["target"]) == (0.05, 5.0)
    assert str(*typed.families) == "for sd2: target=5.0, form=score; as given: alpha=0.05"
    # In the file of an experiment as well, and though it is the default.
    (study / "experiment" / "study.yaml").write_text(
        "# @package _global_\nmethod: {rounds: 2}\ngrid: [method=adjusted_noise]\n"
    )
    (written,) = grid(["experiment=study", "model=sd20"], study)
    assert (written.settings.method["rounds"], written.settings.method["radius"]) == (2, 30.0)


def test_what_a_file_of_ones_own_says_wins_over_settings_by_family_that_it_takes_over(own: Path) -> None:
    (own / "method" / "base.yaml").write_text("defaults: [sail, _self_]\ntarget: 7.0\n")
    (own / "method" / "mine.yaml").write_text("defaults: [base, _self_]\nsteps: 10\n")
    (choice,) = grid(["method=mine"], own)
    assert (choice.settings.method["target"], choice.settings.method["steps"]) == (7.0, 10)
    assert str(*choice.families) == "for planted: rate=0.1, restarts=0; as given: target=7.0, steps=10"


def test_it_is_said_that_nothing_is_published_for_a_family() -> None:
    (sdxl,) = grid(["method=adjusted_noise", "model=sdxl"])
    values = "rounds=2, radius=50.0, timestep=900.0, of=noise, rate=0.7"
    assert str(*sdxl.families) == f"none published for sdxl, so the defaults: {values}"
    (unknown,) = grid(["method=wanda", "model=sdxl", "model.family=null"])
    assert str(*unknown.families).startswith("none published for a model without model.family, so the defaults: ratio")
    assert one("model=sdxl").families == ()


@pytest.mark.parametrize(("group", "name"), [file for file in FILES if file[0] in ("method", "detector")])
def test_settings_of_every_family_can_be_made(group: str, name: str) -> None:
    families = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8")).get("families", {})
    known = {yaml.safe_load(file.read_text(encoding="utf-8"))["family"] for file in (CONF / "model").glob("*.yaml")}
    assert set(families) <= known
    for family in families:
        grid([f"{group}={name}", f"model.family={family}", *([] if group == "method" else ["method=none"])])


@pytest.mark.parametrize(
    ("families", "message"),
    [("{sd1: 3}", "expected settings by family"), ("[sd1]", "expected settings by family"),
     ("{sd9: {strenght: 2}}", "no setting 'strenght' beside it. Did you mean 'strength'"),
     ("{planted: {strength: much}}", "method.strength=much: expected a number")],
)  # fmt: skip
def test_mistakes_in_settings_by_family_are_named(own: Path, families: str, message: str) -> None:
    (own / "method" / "mine.yaml").write_text(
        f"_target_: mine_of_test_config.Mine\nstrength: 1.5\nfamilies: {families}\n"
    )
    with pytest.raises(ConfigError, match=message):
        grid(["method=mine"], own)


def test_all_methods_takes_what_the_files_of_methods_have_for_the_model() -> None:
    """But for variants that are published as such, and a file of paraphrases."""
    variants = {"before", "timestep", "neurons", "file"}
    for choice in grid(["experiment=all_methods"]):
        (plain,) = grid([f"method={choice.names['method']}"])
        differing = {key for key, value in choice.settings.method.items() if value != plain.settings.method[key]}
        assert differing <= variants
        assert not any(set(found.given) - variants for found in choice.families)


TYPED = ["2026_11_29", "1e3", "1_0", "0x10", "007", "1.", "-0", "true", "No", "nan", "inf"]
"""Names that look like something else."""


@pytest.mark.parametrize("text", TYPED)
def test_what_looks_like_a_number_stays_the_text_that_was_typed(text: str, tmp_path: Path) -> None:
    settings = one(f"root={text}", f"logger.entity='{text}'", f"prompts.files=[{text},a.csv]").settings
    assert (settings.root, settings.logger.entity, settings.prompts.files) == (text, text, [text, "a.csv"])
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("_target_: nemo_bench.methods.SavedNeurons\nfile: a.csv\n")
    (choice,) = grid(["method=mine", f"method.file={text}"], tmp_path)
    assert choice.settings.method["file"] == text


def test_what_looks_like_a_number_stays_that_in_lists_of_values_and_in_grids(study: Path) -> None:
    assert [choice.settings.root for choice in grid([f"root={','.join(TYPED)}", "method=none"])] == TYPED
    assert [choice.settings.root for choice in grid(["root=choice(1_0,1e3)", "method=none"])] == ["1_0", "1e3"]
    (study / "experiment" / "study.yaml").write_text("# @package _global_\ngrid: [method=none name=1_0]\n")
    assert grid(["experiment=study"], study)[0].settings.name == "1_0"
    assert [choice.settings.seeds for choice in grid(["seeds=1_0,2", "method=none"])] == [10, 2]


def test_none_can_be_said_where_a_text_may_be_absent() -> None:
    settings = one("real_images=null", "model.revision=NULL", "name=null").settings
    assert (settings.real_images, settings.model.revision, settings.name) == (None, None, "null")


@pytest.mark.parametrize("text", TYPED)
def test_a_yaml_file_of_ones_own_keeps_its_text(text: str, tmp_path: Path) -> None:
    for group in ("experiment", "model", "prompts"):
        (tmp_path / group).mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\nname: {text}\nseeds: 1_0\nmodel: {{revision: {text}}}\nreal_images: null\n"
    )
    (tmp_path / "prompts" / "mine.yaml").write_text(f"files: [{text}, b.csv]\nlimit: 3\n")
    settings = one("experiment=mine", "prompts=mine", conf=tmp_path).settings
    assert (settings.name, settings.model.revision, settings.seeds) == (text, text, 10)
    assert (settings.real_images, settings.prompts.limit) == (None, 3)
    assert settings.prompts.files[0] == text


HOME = str(Path.home())


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("root=~/results", f"{HOME}/results"),
        ("root='~/results'", f"{HOME}/results"),
        ("root=a~b", "a~b"),
        ("root=my results", "my results"),
        ("root=results (new)", "results (new)"),
        ("root=it's", "it's"),
        ("root=a=b&c;d!#^`<>", "a=b&c;d!#^`<>"),
        ("root=größe/☃", "größe/☃"),
        ("root=[old] x", "[old] x"),
        ("root=a$b", "a$b"),
        (r"root=C:\new\x", r"C:\new\x"),
        ("root=${name}", "default"),
        ("prompts.files=my prompts.csv", ["my prompts.csv"]),
        ("prompts.files=[my prompts.csv,~/ö.csv, 'a,b.csv' ]", ["my prompts.csv", "~/ö.csv", "a,b.csv"]),
    ],
)
def test_special_characters_are_taken(word: str, found: str | list[str]) -> None:
    settings = one(word).settings
    assert (settings.root if word.startswith("root") else settings.prompts.files) == found


def test_the_home_folder_is_found_in_files_and_in_arguments_of_classes(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nroot: ~/here\n")
    assert one("experiment=mine", conf=tmp_path).settings.root == f"{HOME}/here"
    assert resolve("~/a.csv") == f"{HOME}/a.csv"
    node = one("metrics=full", "weights=~/w").settings.metrics["sscd"]
    assert build(node, "metrics.sscd").space.file.startswith(f"{HOME}/w/")
    lora = source_of(one("model.lora=~/style.safetensors").settings.model).lora
    assert lora
    assert lora.path == f"{HOME}/style.safetensors"


@pytest.mark.parametrize("key", ["files", "shared_from"])
def test_a_single_list_of_prompts_needs_no_brackets(key: str) -> None:
    assert getattr(one(f"prompts.{key}=a.csv").settings.prompts, key) == ["a.csv"]


@given(st.text())
@example("${name}")
@example("\\\\${name}\\")
@example("'\"'\\\"")
@example("a\nb")
def test_any_text_in_quotes_is_that_text(text: str) -> None:
    (word,) = shlex.split(shell_word("root", text))
    key, value = read(word).key_or_group, read(word).value()
    assert key == "root"
    assert OmegaConf.create({"root": value, "name": "x"}).root == text


@pytest.mark.parametrize(
    "text", ["${name}", "\\${name}", "'\"'\\\"", "a,b", "[x]", "{a: 1}", " x ", "1_0", "\\", "range(1,2)"]
)
def test_text_in_quotes_reaches_the_settings(text: str) -> None:
    (word,) = shlex.split(shell_word("root", text))
    assert one(word).settings.root == text
