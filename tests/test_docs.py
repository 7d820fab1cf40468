"""What README and the documentation show works: commands parse and compose, programs compile, README's one runs."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

import nemo_bench.metrics
from nemo_bench import cli
from nemo_bench.benchmark.audit import settings_of
from nemo_bench.config import describe_options, grid, logger_settings, options, similarity_settings
from nemo_bench.errors import ConfigError
from nemo_bench.metrics import BenchMetric
from nemo_bench.records.schema import FILES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (?! ).*$", re.MULTILINE)
INLINE = re.compile(r"`(nemo-bench [^`]+)`")


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(page: Path) -> list[str]:
    """Every command line that begins with nemo-bench, or holds it after &&, without comments."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for language, _, body in BLOCK.findall(text) if language in ("sh", "console")]
    shown = "\n".join([*blocks, *INDENTED.findall(BLOCK.sub("", text))]).replace("\\\n", " ")
    lines = [re.split(r"\s+#", line.strip())[0].split("&& ")[-1] for line in shown.split("\n")]
    lines = [line.removeprefix("$ ").removeprefix("srun ") for line in lines]
    # What a command prints may begin with its name and a colon.
    found = [line for line in lines if re.match(r"nemo-bench(?!:)", line)]
    return [*found, *(span for span in INLINE.findall(BLOCK.sub("", text)) if " COMMAND" not in span)]


COMMANDS = [(page, command) for command, page in {c: relative(p) for p in PAGES for c in commands(p)}.items()]
"""Page and command, each command once."""


def subcommands() -> set[str]:
    (action,) = (action for action in cli._parser()._actions if isinstance(action.choices, dict))
    return set(action.choices or ())


def parse(command: str) -> argparse.Namespace:
    """The options of a command line, read as the program reads them."""
    _, *words = shlex.split(command, comments=True)
    options, rest = cli._parser().parse_known_args(words)
    if rest:
        assert hasattr(options, "overrides")
        assert not any(word.startswith("-") for word in rest)
        options.overrides += rest
    return options


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader who wrote every file that the pages show, with a title, into it."""
    for page in PAGES:
        for _, title, body in BLOCK.findall(page.read_text(encoding="utf-8")):
            if title and not title.startswith("conf/"):
                (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / title).write_text(body, encoding="utf-8")
    for module in tmp_path.glob("*.py"):
        monkeypatch.delitem(sys.modules, module.stem, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/howto/faults.md"])
def test_every_test_that_a_page_names_is_there(page: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 10
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page} names {file}::{test}"


def test_pages_show_commands() -> None:
    assert {"README.md", "docs/index.md", "docs/howto/method.md"} <= {page for page, _ in COMMANDS}
    assert ("docs/howto/cluster.md", "nemo-bench run model=sd14 trainer=gpu trainer.devices=4 trainer.num_nodes=2") in (
        COMMANDS
    )


def test_the_two_commands_of_the_readme_stay() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").split("\n")
    assert "    pip install -e . && nemo-bench run" in lines
    assert '    pip install -e ".[dev]" && pytest' in lines


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_parses_and_composes(page: str, command: str, folder: Path) -> None:
    _, *words = command.split()
    if len(words) == 1:  # the name of a command in a sentence
        assert words[0] in subcommands()
        return
    # Images made elsewhere are scored under any name.
    named = command.replace(" method=theirs", " method=none") if words[0] == "score" else command
    try:
        options = parse(named)
    except SystemExit as stopped:
        pytest.fail(f"{page}: {command}: exit {stopped.code}")
    expected = re.search(re.escape(f"$ {command}\n") + "nemo-bench: (.*)", (ROOT / page).read_text(encoding="utf-8"))
    if expected:
        with pytest.raises(ConfigError) as caught:
            grid(options.overrides, options.conf)
        assert str(caught.value) == expected[1]
    elif options.command is cli._train:
        cli.training_settings(options.overrides)
    elif options.command is cli._ls and options.group:
        assert describe_options(options.group, options.conf)
    elif options.command is cli._track:
        assert logger_settings(options.overrides)
    elif options.command is cli._similarity:
        assert similarity_settings(options.overrides, options.conf)
    elif options.command is cli._audit:
        _, others = settings_of(options.overrides)
        assert not others
    elif hasattr(options, "overrides"):
        assert grid(options.overrides, options.conf)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_programs_compile(page: Path) -> None:
    for language, title, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(body, title or relative(page), "exec")


@pytest.mark.parametrize("name", ["README.md"])
def test_program_runs(name: str, folder: Path) -> None:
    programs = [body for language, _, body in BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))]
    (program,) = [body for body in programs if "import" in body]
    names: dict[str, object] = {}
    exec(compile(program, name, "exec"), names)
    assert tuple(names["images"].shape) == (4, 3, 64, 64)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mark_is_filled_in(hooks: ModuleType) -> None:
    marks = [mark for page in PAGES for mark in hooks.MARK.findall(page.read_text(encoding="utf-8"))]
    assert {name for kind, name in marks if kind == "code"} == set(hooks.PARTS)
    assert all((ROOT / name).is_file() for kind, name in marks if kind == "file")
    page = hooks.on_page_markdown("before\n<!-- from code: prompts -->\nafter")
    assert page.startswith("before\n| name |")
    assert page.endswith("|\nafter")


def test_metrics_of_one_name_are_told_apart(hooks: ModuleType) -> None:
    text = hooks.metrics()
    for limit in ("Pixel distance < 0.15", "SSCD disc large membench > 0.5", "SSCD disc mixup > 0.7"):
        assert f"### Memorized ({limit}) " in text
    anchors = re.findall(r"^###.*\{#(.+)\}$", text, re.MULTILINE)
    assert len(anchors) == len(set(anchors))


@pytest.mark.parametrize("group", ["method", "detector", "localizer", "region"])
def test_every_method_detector_and_localizer_has_a_card(hooks: ModuleType, group: str) -> None:
    text = hooks.PARTS[f"{group}s"]()
    for name in options(group):
        assert f"{{#{group}-{name}}}" in text


def test_every_metric_is_defined(hooks: ModuleType) -> None:
    text = hooks.measures()
    public = [getattr(nemo_bench.metrics, name) for name in nemo_bench.metrics.__all__]
    classes = [c for c in public if inspect.isclass(c) and issubclass(c, BenchMetric) and not inspect.isabstract(c)]
    assert classes
    assert [c.__name__ for c in classes if f"[nemo_bench.metrics.{c.__name__}]" not in text] == []


def test_every_command_is_described(hooks: ModuleType) -> None:
    text = hooks.commands()
    assert all(f"## nemo-bench {name} " in text for name in subcommands())


def test_fields_of_records_and_files_are_described_by_their_comments(hooks: ModuleType) -> None:
    records, files = hooks.records(), hooks.files()
    assert "| `prompt` | `str` | yes | Id of the prompt. |" in records
    in_lines_above = "What it took; all that may differ between two runs beside `sha256` and `bytes`."
    assert f"| `cost` | `Cost or None` |  | {in_lines_above} |" in records
    assert '"description": "UNet forward passes of one sample."' in records
    assert '"description": "The candidates before refinement."' in records
    assert "| `schema` | `int` |  | Of the schema. |" in files
    headings = re.findall(r"^### `(.+?)` ", files, re.MULTILINE)
    assert {"env.json", "audit.json", "thumbnails.json"} < set(headings) < set(FILES)
