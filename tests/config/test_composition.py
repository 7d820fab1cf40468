"""Grids of cells: every file of conf/ composes, and errors come before anything is loaded."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cell_configs import FILES, one_cell
from nemo_bench.config import (
    GROUPS,
    PromptSettings,
    build,
    describe_options,
    grid,
    logger_settings,
    options,
)
from nemo_bench.errors import ConfigError
from nemo_bench.methods import Method, NeMo, NoMitigation, OtherNeurons, RandomNeurons, SharedNeurons
from nemo_bench.metrics import BenchMetric


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


def test_without_a_method_nemo_is_compared_with_its_controls() -> None:
    choices = grid(["seeds=3"])
    assert [choice.names["method"] for choice in choices] == ["none", "random", "nemo", "other_prompt", "one_edit"]
    kinds = [NoMitigation, RandomNeurons, NeMo, OtherNeurons, SharedNeurons]
    assert [type(build(c.settings.method, "method")) for c in choices] == kinds
    assert all(choice.settings.seeds == 3 for choice in choices)
    assert set(choices[0].names) == set(GROUPS) - {"experiment", "detector", "localizer", "region"}


def test_comma_lists_are_multiplied_out_and_the_method_changes_fastest() -> None:
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
    assert method.source.theta == 4
    assert choice.settings.model.similarity.betas == [0.5, 0.5]


def test_experiment_replaces_defaults_and_overrides_replace_the_experiment() -> None:
    smoke = one_cell("experiment=smoke", "seeds=9")
    assert smoke.names["experiment"] == "smoke"
    assert (smoke.settings.seeds, smoke.settings.model.steps, smoke.settings.name) == (9, 8, "smoke")
    assert one_cell().settings.model.steps != 8


@pytest.mark.parametrize("name", options("experiment"))
def test_cells_of_every_experiment_differ_and_it_has_a_summary(name: str) -> None:
    choices = grid([f"experiment={name}"])
    settings = [choice.settings for choice in choices]
    assert all(a != b for a, b in itertools.combinations(settings, 2))
    assert {s.name for s in settings} == {name}
    assert all(isinstance(build(s.method, "method"), Method) for s in settings)
    (listed,) = (entry for entry in describe_options("experiment") if entry["name"] == name)
    assert listed["summary"] == settings[0].summary != ""


def cells_of(overrides: str, conf: Path) -> list[tuple[str, float | None, int, int]]:
    """Method, theta, seeds and steps of each cell."""
    return [
        (c.names["method"], c.settings.method.get("theta"), c.settings.seeds, c.settings.model.steps)
        for c in grid(overrides.split(), conf)
    ]


def test_each_line_of_an_experiment_is_multiplied_out(study: Path) -> None:
    steps = one_cell().settings.model.steps
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


def test_overrides_win_over_the_lines_of_an_experiment(study: Path) -> None:
    # A method takes the place of the method's settings too; lines that then are the same count once.
    steps = one_cell().settings.model.steps
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
        ("{method.theta: 3}", r"^experiment=study: grid=\{'method.theta': 3\}: expected a list, in brackets"),
        ("[nemo]", "can't read an override"),
    ],
)
def test_errors_name_mistakes_in_the_grid_of_an_experiment(study: Path, grid_: str, message: str) -> None:
    (study / "experiment" / "study.yaml").write_text(f"# @package _global_\ngrid: {grid_}\n")
    with pytest.raises(ConfigError, match=message):
        grid(["experiment=study"], study)


def test_prompt_files_take_no_settings_of_another_list() -> None:
    """The embedded model's captions calibrated Stable Diffusion, and nobody said so."""
    for words in (["prompts.files=mine.csv"], ["prompts=coco", "prompts.files=[a.csv,b.csv]"]):
        found = one_cell(*words).settings.prompts
        assert found == PromptSettings(files=found.files)
    typed = one_cell("prompts.files=a.csv", "prompts.calibration=b.csv", "prompts.limit=3", "prompts.shared_from=c.csv")
    expected = PromptSettings(files=["a.csv"], calibration="b.csv", limit=3, shared_from=["c.csv"])
    assert typed.settings.prompts == expected
    assert (
        one_cell("prompts=coco", "prompts.limit=3").settings.prompts.calibration == "data/additional_laion_prompts.csv"
    )


def test_prompt_files_of_an_experiment_take_no_settings_of_another_list(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "study.yaml").write_text("# @package _global_\nprompts: {files: [a.csv], limit: 3}\n")
    written = one_cell("experiment=study", "prompts.calibration=c.csv", conf=tmp_path)
    assert written.settings.prompts == PromptSettings(["a.csv"], calibration="c.csv", limit=3)
    assert written.names["prompts"] == "a"
    assert one_cell("experiment=study", "prompts.files=b.csv", conf=tmp_path).settings.prompts == PromptSettings(
        ["b.csv"]
    )


def test_metrics_are_added_and_deleted() -> None:
    names = set(one_cell().settings.metrics)
    again = one_cell("~metrics.ssim", "+metrics.again._target_=nemo_bench.metrics.MemorizationScore").settings.metrics
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
        ("method=nemo method.neurons=refind", "method.neurons=refind: expected one of refined, initial.*mean 'refined"),
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
def test_errors_name_key_value_and_choices(overrides: str, message: str) -> None:
    words = overrides.split()
    with pytest.raises(ConfigError, match=message):
        grid(words if "method=" in overrides else ["method=none", *words])


def test_experiment_may_be_null() -> None:
    # run.yaml says it, so a command line may too.
    assert "experiment" not in one_cell("experiment=null").names


def test_method_of_the_user_is_an_option(own: Path) -> None:
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
        (
            "_target_: mine_of_test_config.Mine\nstrength: 1\nwords: [a, 2]",
            r"method.words=\['a', 2\]: expected text in every place of the list",
        ),
        ("_target_: mine_of_test_config.Other", "can't be imported"),
        ("strength: 1", "method: expected _target_"),
        ("_target_: [", "mine"),
    ],
)
def test_errors_name_mistakes_in_a_method_of_the_user(own: Path, yaml: str, message: str) -> None:
    (own / "method" / "mine.yaml").write_text(yaml + "\n")
    with pytest.raises(ConfigError, match=message):
        grid(["method=mine"], own)


def test_missing_conf_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--conf .*gone is no folder"):
        grid(["method=none"], tmp_path / "gone")


@pytest.mark.parametrize("name", ["my conf", "a,b", "größe"])
def test_conf_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "method").mkdir(parents=True)
    (tmp_path / name / "method" / "mine.yaml").write_text("_target_: nemo_bench.methods.NoMitigation\n")
    (tmp_path / name / "method" / "._mine.yaml").write_text("left by a system")
    (choice,) = grid(["method=mine"], tmp_path / name)
    assert choice.names["method"] == "mine"
    assert [option for option in options("method", tmp_path / name) if "mine" in option] == ["mine"]


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


def test_logger_settings_are_made_alone() -> None:
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
def test_errors_explain_wrong_settings_of_the_logger(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        logger_settings(words)


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("all_methods", {"before", "timestep", "neurons", "file"}),
        ("new_methods", {"factor", "change", "loss"}),
    ],
)
def test_comparisons_of_methods_use_the_settings_of_each_for_the_model(name: str, variants: set[str]) -> None:
    """But for variants that are published as such, a control, and a file of paraphrases."""
    for choice in grid([f"experiment={name}", "strengths=false"]):
        (plain,) = grid([f"method={choice.names['method']}"])
        differing = {key for key, value in choice.settings.method.items() if value != plain.settings.method[key]}
        assert differing <= variants
        assert not any(set(found.given) - variants for found in choice.families)


def test_every_method_is_in_a_comparison_of_methods() -> None:
    """But for those that need a file or a training of the user's, and the control of shared neurons."""
    words = [[f"experiment={name}", "strengths=false"] for name in ("all_methods", "new_methods")]
    compared = {choice.names["method"] for each in words for choice in grid(each)}
    assert set(options("method")) - compared == {"random_shared", "saved", "sinks"}
