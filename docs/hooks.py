"""What pages take from the code, so that it cannot drift from it.

A line ``<!-- from code: NAME -->`` of a page is replaced by what the function of that name below returns, and a line
``<!-- from file: PATH -->`` by a file of the repository.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

import nemo_bench.metrics
from nemo_bench import cli
from nemo_bench.config import build, describe_options, grid, options
from nemo_bench.config.listing import field_texts
from nemo_bench.diffusion import FAMILIES
from nemo_bench.methods import FittedMethod
from nemo_bench.metrics import BenchMetric, ImageSpace
from nemo_bench.records import schema as records_schema
from nemo_bench.records.data import Prompt
from nemo_bench.records.schema import FILES, RECORDS, Entry, MetricInfo, ScoreRecord
from nemo_bench.records.statistics import presets

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- from (code|file): (\S+) -->$", re.MULTILINE)


BETTER = {True: "higher", False: "lower", None: "–"}
PER = {"image": "an image", "prompt": "a prompt", "set": "all images"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in the marks of a page; called by MkDocs."""
    return MARK.sub(lambda match: PARTS[match[2]]() if match[1] == "code" else included(match[2]), markdown)


def included(path: str) -> str:
    """A file of the repository, its links to pages as they are from a page."""
    return (ROOT / path).read_text(encoding="utf-8").rstrip().replace("](docs/", "](")


def commands() -> str:
    """Every subcommand with its help."""
    os.environ["COLUMNS"] = "100"
    parser = cli._parser()
    (subcommands,) = (action for action in parser._actions if isinstance(action.choices, dict))
    parts = [_code("text", parser.format_help())]
    for name, sub in subcommands.choices.items():
        parts.append(f"## nemo-bench {name} {{#{name}}}\n\n{_code('text', sub.format_help())}")
    return "\n\n".join(parts)


def metrics() -> str:
    """Every metric that a file of ``conf/metrics`` names, in the words of its class: a table, then the definitions.

    Files may mean different metrics by one name: the anchors of further ones begin with the name of their file.
    """
    files: dict[tuple[str, str, str], list[str]] = {}
    found: dict[str, tuple[str, BenchMetric]] = {}
    for file in options("metrics"):
        (choice,) = grid([f"metrics={file}", "method=none"])
        for name, node in choice.settings.metrics.items():
            metric = build(node, f"metrics.{name}")
            key = (name, metric.title, metric.description)
            if key not in files:
                found[f"{file}-{name}" if name in found else name] = name, metric
            files.setdefault(key, []).append(f"`{file}`")
    heads = ("metric", "name", "better", "range", "a value for", "metrics=")
    rows = (
        (
            f"[{metric.title}](#{anchor})",
            f"`{name}`",
            BETTER[metric.higher_is_better],
            _range(metric),
            PER[metric.per],
            ", ".join(files[name, metric.title, metric.description]),
        )
        for anchor, (name, metric) in found.items()
    )
    return "\n\n".join([_table(heads, rows), *(_definition(anchor, metric) for anchor, (_, metric) in found.items())])


def _definition(anchor: str, metric: BenchMetric) -> str:
    kind = type(metric).__name__
    needs = ", ".join(f"`{field}`" for field in sorted(metric.needs))
    facts = f"Needs {needs}. Class [`{kind}`][nemo_bench.metrics.{kind}]."
    source = f" Source: {metric.citation}." if metric.citation else ""
    return f"### {metric.title} {{#{anchor}}}\n\n{_sentence(metric.description)}\n\n{facts}{source}"


def _range(metric: BenchMetric) -> str:
    if metric.lower is None or metric.upper is None:
        return "open" if metric.lower is None else f"from {metric.lower:g}"
    return f"{metric.lower:g} to {metric.upper:g}"


def measures() -> str:
    """Every class of metrics."""
    return _classes(BenchMetric)


def spaces() -> str:
    """Every class of spaces."""
    return _classes(ImageSpace)


def _classes(base: type) -> str:
    public = (getattr(nemo_bench.metrics, name) for name in nemo_bench.metrics.__all__)
    kinds = [c for c in public if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)]
    return _table(
        ("class", "what it is"), ((f"[`{c.__name__}`][nemo_bench.metrics.{c.__name__}]", _first(c)) for c in kinds)
    )


def aggregates() -> str:
    """The presets of aggregation, in their own words."""
    info = MetricInfo(title="", role="training_similarity", family="memorization", higher_is_better=False)
    record = ScoreRecord(id="a", prompt="a", seed=0, scores={"similarity": 0.5})
    found = presets([record], [Prompt("a", "a prompt", "VM")], {"similarity": info})
    rows = ((f"`{name}`", f"{p.title} ({p.citation})", p.definition) for name, p in found.items())
    return _table(("preset", "after", "definition"), rows)


def records() -> str:
    """The fields of every record, with its JSON schema."""
    return "\n\n".join(_entry(f"records/{kind.stage}.<n>.jsonl", kind) for kind in RECORDS)


def files() -> str:
    """The fields of every file of entries, with their JSON schema."""
    kinds = {name: [form, *get_args(form)][-1] for name, (form, _) in FILES.items()}
    return "\n\n".join(_entry(name, kind) for name, kind in kinds.items() if isinstance(kind, type(Entry)))


def version() -> str:
    """The version of the schema."""
    return f"This is version {records_schema.VERSION}."


def repairs() -> str:
    """How every file that was lost or damaged is written again."""
    return _table(("file", "is written again by"), ((f"`{name}`", repair) for name, (_, repair) in FILES.items()))


def _entry(file: str, kind: type[Entry]) -> str:
    """What is in a file or line: a table of its fields, and their schema for other programs."""
    described = _attributes(kind)
    schema = kind.model_json_schema(by_alias=True)
    parts = {name: getattr(records_schema, name) for name in schema.get("$defs", {})}
    for part, own in ((schema, kind), *((schema["$defs"][name], inner) for name, inner in parts.items())):
        texts = _attributes(own)
        for name, field in part["properties"].items():
            if text := texts.get("version" if name == "schema" else name):
                field["description"] = text
    rows = []
    for name, field in kind.model_fields.items():
        shown = field.alias or name
        type_ = re.sub(r"typing\.|nemo_bench\.records\.\w+\.", "", inspect.formatannotation(field.annotation))
        type_ = type_.replace(" | ", " or ")  # a code span of a table can't hold the separator of columns
        rows.append((f"`{shown}`", f"`{type_}`", "yes" if field.is_required() else "", described.get(name, "")))
    text = json.dumps(schema, indent=1, ensure_ascii=False)
    title = f"### `{file}` {{#{kind.__name__.lower()}}}"
    about = _sentence(_first(kind).replace("``", "`"))
    table = _table(("field", "type", "always", "what it is"), rows)
    return "\n\n".join([title, about, table, f'??? abstract "JSON schema"\n\n{_indent(_code("json", text))}'])


def _attributes(kind: type) -> dict[str, str]:
    """Descriptions of fields, from the comments of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if base is kind or issubclass(base, Entry)]):
        found |= field_texts(inspect.getsource(base))
    return {name: re.sub(r":\w+:`([^`]*)`", r"`\1`", text).replace("``", "`") for name, text in found.items()}


def methods() -> str:
    """A card of every method."""
    return "\n\n".join(_card("method", entry) for entry in describe_options("method"))


def detectors() -> str:
    """A card of every detector."""
    return "\n\n".join(_card("detector", entry) for entry in describe_options("detector"))


def localizers() -> str:
    """A card of every localizer."""
    return "\n\n".join(_card("localizer", entry) for entry in describe_options("localizer"))


def regions() -> str:
    """A card of every localizer of regions."""
    return "\n\n".join(_card("region", entry) for entry in describe_options("region"))


def _card(group: str, entry: Mapping[str, str]) -> str:
    """What a method, detector or localizer is, in the words of its class, its file of settings and its source."""
    (choice,) = grid([f"{group}={entry['name']}", *(["method=none"] if group != "method" else [])])
    kind = type(build(getattr(choice.settings, group), group))
    places = {"localizer": "localization.localizers", "region": "detectors.regions"}
    place = places.get(group, f"{group}s")
    link = f"Equation, defaults and limits: [`{kind.__name__}`][nemo_bench.{place}.{kind.__name__}]."
    facts = [
        ("touches", getattr(kind, "touches", "")),
        ("UNet passes of its own", _own_passes(kind)),
        ("read for it", getattr(kind, "sourcing", "")),
        ("works with", _works_with(kind)),
    ]
    lines = "\n".join(f"- {name}: {fact}" for name, fact in facts if fact)
    parts = [f"### {kind.title} {{#{group}-{entry['name']}}}", f"{_sentence(entry['summary'])} {link}", lines]
    parts.append(_file(group, entry["name"]))
    if entry["citation"]:
        parts.append(f'??? quote "BibTeX"\n\n{_indent(_code("bibtex", entry["citation"]))}')
    return "\n\n".join(parts)


def _own_passes(kind: type) -> str:
    """Whether a method makes passes beside those of images, a fit's included; nothing for what has none to make."""
    if issubclass(kind, FittedMethod):
        return "to fit weights"
    return {True: "yes", False: "no", None: ""}[getattr(kind, "makes_passes", None)]


def _works_with(kind: Any) -> str:
    """Families of models that a method or detector works with, and why not with others."""
    families = getattr(kind, "families", frozenset())
    if not families or families == frozenset(FAMILIES):
        return "every family of models" if families else ""
    names = ", ".join(sorted(name.removesuffix("Pipeline") for name in families))
    return f"{names}; {kind.limits}"


def models() -> str:
    """A table of the models."""
    rows = []
    for entry in describe_options("model"):
        (choice,) = grid([f"model={entry['name']}", "method=none"])
        model = choice.settings.model
        rows.append((f"`{entry['name']}`", entry["summary"], model.source, model.steps, f"{model.guidance:g}"))
    return _table(("name", "model", "source", "steps", "guidance"), rows)


def prompts() -> str:
    """A table of the lists of prompts."""
    return _table(("name", "prompts"), ((f"`{e['name']}`", e["summary"]) for e in describe_options("prompts")))


def experiments() -> str:
    """Every experiment, as its file has it."""
    return "\n\n".join(
        f"### {name} {{#experiment-{name}}}\n\n{_file('experiment', name)}" for name in options("experiment")
    )


def loggers() -> str:
    """Every logger, as its file has it."""
    return "\n\n".join(_file("logger", name) for name in options("logger"))


def launchers() -> str:
    """Every launcher, as its file has it."""
    return "\n\n".join(_file("launcher", name) for name in options("launcher"))


def names() -> str:
    """The names that ``from nemo_bench import ...`` knows."""
    rows = []
    for name in nemo_bench.__all__:
        value = getattr(nemo_bench, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            package = ".".join(value.__module__.split(".")[:2])
            place = value.__module__ if package == "nemo_bench.records" else package
            rows.append((f"[`{name}`][{place}.{name}]", _first(value)))
    return _table(("name", "what it is"), rows)


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (
        aggregates,
        commands,
        detectors,
        experiments,
        files,
        launchers,
        localizers,
        loggers,
        measures,
        methods,
        metrics,
        models,
        names,
        prompts,
        records,
        regions,
        repairs,
        spaces,
        version,
    )
}


def _first(value: Any) -> str:
    return (inspect.getdoc(value) or "").split("\n")[0]


def _file(group: str, name: str) -> str:
    path = Path("conf") / group / f"{name}.yaml"
    content = (ROOT / path).read_text(encoding="utf-8")
    yaml.safe_load(content)
    return f'```yaml title="{path.as_posix()}"\n{content.rstrip()}\n```'


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [[*heads], ["---"] * len([*heads]), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].removesuffix('.')}."
