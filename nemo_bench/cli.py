"""The command line: ``nemo-bench COMMAND [key=value ...]``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bench.environment import prepare_process
from nemo_bench.errors import NemoBenchError, counted, did_you_mean, shortened

if TYPE_CHECKING:
    from nemo_bench.config import CellConfig

EPILOG = """settings are words key=value, lists of values make a grid:
  nemo-bench run                                   no mitigation, NeMo and its controls on the embedded model
  nemo-bench run seeds=8 method=none,nemo          other settings
  nemo-bench run model=planted model.guidance=5    a group's own settings
  nemo-bench detect detector=magnitude,sharpness   how well detectors tell memorized prompts from others
  nemo-bench ls                                    what there is to choose from
"""

LIMITS = (
    ("parallel", int, "links at a time; default 16"),
    ("retries", int, "further tries of what may heal: 429, 5xx, time-outs, broken connections; default 3"),
    ("total", float, "seconds a try may take altogether; default 90"),
    ("megabytes", float, "most megabytes of an image; default 32"),
    ("megapixels", float, "most megapixels of an image; default 64"),
)
"""Options of ``references``, fields of :class:`nemo_bench.prompts.download.Limits`."""
RESUMABLE = ("run", "detect", "calibrate", "score", "audit", "references", "train")
"""Commands that keep what they finished, and go on from there."""
READS = {
    "report": ("folder", "a run, such as results/default"),
    "track": ("folder", "a run or a cell"),
    "audit": ("folder", "a run or a cell"),
    "export": ("cell", "a cell, results/<name>/<cell>"),
    "score": ("folder", "a run, a cell, or a folder of images"),
}
"""Commands that read a folder: the argument that names it, and what it should be."""
LISTED_LINKS = 20
"""Dead links that are printed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Words after the program's name; None takes those it was started with.

    Returns:
        0, 1 after an error that was explained, or 130 where it was stopped.
    """
    if arguments is None:
        prepare_process()
        arguments = sys.argv[1:]
    options = _options(arguments)
    from nemo_bench.benchmark.processes import stop_at_sigterm

    stop_at_sigterm()
    try:
        _check_given(options)
        options.command(options)
    except NemoBenchError as error:
        print(f"nemo-bench: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Who reads the output, such as `head`, has enough; Python would complain of it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        kept = "; all finished records are kept; once this is mended, the same command goes on"
        print(f"nemo-bench: {shortened(str(error))}{kept if options.goes_on else ''}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit):
        kept = "; all finished records are kept, the same command goes on" if options.goes_on else ""
        print(f"\nnemo-bench: stopped{kept}", file=sys.stderr)
        return 130
    return 0


def _check_given(options: argparse.Namespace) -> None:
    """Refuses a folder to read that is not there, before torch loads."""
    if options.name_of_command in READS:
        from nemo_bench.records.io import check_folder

        argument, wanted = READS[options.name_of_command]
        check_folder(getattr(options, argument), wanted)


def _options(words: Sequence[str]) -> argparse.Namespace:
    """What was asked for; help where that is nothing, an error that names the nearest where there is no such thing."""
    parser = _parser()
    _complete(parser)
    if not words:
        parser.print_help()
        raise SystemExit(0)
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, Mapping))
    first = words[0]
    if "=" in first and not first.startswith("-"):
        parser.error(f"{first}: a command comes first, such as: nemo-bench run {shlex.join(words)}")
    if not first.startswith("-") and first not in commands:
        parser.error(f"unknown command '{first}'. {did_you_mean(first, commands)}")
    options, rest = parser.parse_known_args(words)
    sub = commands[options.name_of_command]
    for word in rest:
        if word.startswith("-"):
            known = [option for option in sub._option_string_actions if option.startswith("--")]
            sub.error(f"unknown option '{word}'. {did_you_mean(word, known)}")
        if not hasattr(options, "overrides"):
            sub.error(f"unknown argument '{word}'; nemo-bench {options.name_of_command} takes no settings")
    # argparse takes all settings from one place; those after an option are settings as well.
    if rest:
        options.overrides += rest
    options.line = shlex.join(["nemo-bench", *words])
    return options


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answers a shell that asks how the words typed so far may go on, where argcomplete is installed."""
    if "_ARGCOMPLETE" in os.environ and importlib.util.find_spec("argcomplete"):
        import argcomplete

        argcomplete.autocomplete(parser)


def _settings_so_far(prefix: str, **_: Any) -> list[str]:
    """How a ``key=value`` word may go on: keys, or after a group's name its options."""
    from nemo_bench.config import GROUPS, RunSettings, options

    key, separator, _rest = prefix.partition("=")
    if separator:
        return [f"{key}={name}" for name in options(key)] if key in GROUPS else []
    return [f"{field.name}=" for field in fields(RunSettings) if field.name not in ("summary", "grid")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "nemo-bench",
        description="Benchmark memorization in text-to-image diffusion models and its mitigation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nemo-bench {version('nemo-bench')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name_of_command")

    def add(name: str, command: Any, text: str, *, settings: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command, goes_on=name in RESUMABLE)
        if settings:
            words = sub.add_argument(
                "overrides", nargs="*", metavar="key=value", help="settings; see nemo-bench --help"
            )
            words.completer = _settings_so_far  # type: ignore[attr-defined] # read by argcomplete
            sub.add_argument(
                "--conf", type=Path, metavar="DIR", help="folder with more YAML files, in group subfolders"
            )
            sub.add_argument(
                "--cfg", action="store_true", help="print the settings of every cell, defaults filled in; do nothing"
            )
        return sub

    run = add("run", _run, "the main job: all cells of a grid, resumable, to table and report", settings=True)
    run.add_argument(
        "--dry-run", action="store_true", help="say what is needed, what would be done and what it costs; load nothing"
    )
    run.add_argument("--json", action="store_true", help="print JSON instead of tables")
    detect = add("detect", _detect, "detectors over memorized and other prompts, to table and ROC plots", settings=True)
    detect.add_argument("--json", action="store_true", help="print an object in place of the table")
    calibrate = add("calibrate", _calibrate, "activation statistics and threshold of a model, cached", settings=True)
    calibrate.add_argument("--json", action="store_true", help="print a list of objects")
    listing = add("ls", _ls, "models, methods, detectors, prompts, metrics ... to choose from")
    listing.add_argument("group", nargs="?", help="one group only, with sources")
    listing.add_argument("name", nargs="?", help="one of the group, with all that can be set")
    listing.add_argument("--conf", type=Path, metavar="DIR", help="folder with more YAML files, in group subfolders")
    listing.add_argument("--json", action="store_true", help="print a list of objects")
    report = add("report", _report, "table, plots and HTML again, from the records of a run")
    report.add_argument("folder", type=Path, metavar="DIR", help="results/<name>")
    track = add("track", _track, "log a finished run or cell to W&B or another logger, now or again")
    track.add_argument("folder", type=Path, metavar="DIR", help="results/<name>, or results/<name>/<cell>")
    track.add_argument("overrides", nargs="*", metavar="key=value", help="logger=..., logger.project=... and so on")
    track.add_argument("--again", action="store_true", help="log to W&B what has not changed since as well")
    export = add("export", _export, "save a pipeline with neurons switched off for good")
    export.add_argument("cell", type=Path, metavar="CELL", help="results/<name>/<cell>")
    export.add_argument("folder", type=Path, metavar="DIR", help="where the diffusers folder goes")
    export.add_argument(
        "--prompt", metavar="ID", help="neurons of one prompt; default: of all memorized prompts together"
    )
    score = add("score", _score, "metrics of images on disk: of a run again, or of external images")
    score.add_argument("folder", type=Path, metavar="DIR", help="results/<name>, a cell of it, or a folder of images")
    score.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as metrics=full; for "
                       "external images also model, prompts and method, which may be any name")  # fmt: skip
    score.add_argument("--map", type=Path, metavar="FILE", help="csv, jsonl or parquet: image, id or text of its "
                       "prompt, seed; without, images are named img_0000_00.jpg")  # fmt: skip
    score.add_argument("--conf", type=Path, metavar="DIR", help="folder with more YAML files, in group subfolders")
    score.add_argument("--json", action="store_true", help="print JSON instead of tables")
    audit = add("audit", _audit, "search for embeddings that bring training images back, though neurons are off")
    audit.add_argument("folder", type=Path, metavar="DIR", help="results/<name>, or results/<name>/<cell>")
    audit.add_argument("overrides", nargs="*", metavar="key=value", help="steps, rate, samples, start, images, limit, "
                       "controls; also metrics, batch_size and trainer")  # fmt: skip
    audit.add_argument("--cell", action="append", default=[], metavar="NAME", help="a cell's folder or its method; may "
                       "be given again; without, all that can be audited")  # fmt: skip
    audit.add_argument("--conf", type=Path, metavar="DIR", help="folder with more YAML files, in group subfolders")
    audit.add_argument("--json", action="store_true", help="print a list of objects, one an audit")
    references = add("references", _references, "fetch training images from the links of prompt lists, resumable")
    references.add_argument("lists", nargs="+", metavar="LIST", help="prompt file with a column url or urls")
    references.add_argument("folder", type=Path, metavar="DIR", help="where the images go; then prompts.references=DIR")
    for name, kind, text in LIMITS:
        references.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    references.add_argument("--private", action="store_true", help="fetch from addresses that are not public, too")
    references.add_argument("--json", action="store_true", help="print an object, with every dead link")
    train = add("train", _train, "train the embedded model afresh")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="fields of TrainSpec, such as out=DIR")
    return parser


def _run(options: argparse.Namespace) -> None:
    from nemo_bench.config import grid

    choices = grid(options.overrides, options.conf)  # before torch loads, so that mistakes are said at once
    if options.cfg:
        _print_settings(choices, options.json)
        return
    if options.dry_run:
        _dry_run(choices, options.json)
        return
    from nemo_bench.benchmark.pending import check_images, is_complete, pending_work, track_cells
    from nemo_bench.benchmark.plan import Planner
    from nemo_bench.benchmark.processes import is_main
    from nemo_bench.records.results import load_results

    planner = Planner()
    cells = planner.plan(choices)
    planner.check()
    start = time.perf_counter()
    say = _aside if options.json else print
    folder = cells[0].store.folder.parent
    pending = sum(sum(work.records.values()) for work in pending_work(cells))
    if is_complete(cells):
        if is_main():
            track_cells(load_results(folder), cells, say)
    else:
        from nemo_bench.benchmark.run import run  # with it Lightning loads

        run(cells, options.line, say=say, progress=not options.json)
    if is_main():
        done = f"{pending} records computed" if pending else "everything was done already"
        _show(folder, f"{done}, {time.perf_counter() - start:.0f} s", as_json=options.json)
        _warn_of_limits(choices)
        check_images(cells)


def _detect(options: argparse.Namespace) -> None:
    from nemo_bench.config import detector_grid

    choices = detector_grid(options.overrides, options.conf)  # before torch loads, so that mistakes are said at once
    if options.cfg:
        _print_settings(choices, options.json)
        return
    from nemo_bench.benchmark import detect as detection
    from nemo_bench.benchmark.processes import is_main
    from nemo_bench.records.results import load_detections
    from nemo_bench.report.terminal import show, terminal_detection

    cells = detection.plan(choices)
    start = time.perf_counter()
    is_done = not detection.is_pending(cells)
    folder = detection.detect(cells, options.line, progress=not options.json)
    if is_main() and options.json:
        print((folder / "detection.json").read_text(encoding="utf-8"))
    elif is_main():
        show(*terminal_detection(load_detections(folder)))
        for cell in cells:
            for found in cell.config.families:
                print(f"{cell.spec.detector} on {cell.spec.model}, settings {found}")
        done = "everything was done already" if is_done else "done"
        print(f"{done}, {time.perf_counter() - start:.0f} s\nreport:  {folder / 'detection.html'}\nrecords: {folder}")
    if is_main():
        detection.check_scored(cells)


def _print_settings(choices: Sequence[CellConfig], as_json: bool) -> None:
    """The settings of each cell in full, as YAML documents or a list of objects."""
    import yaml

    found = [asdict(choice.settings) for choice in choices]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for number, (choice, settings) in enumerate(zip(choices, found, strict=True), 1):
        names = " ".join(f"{group}={name}" for group, name in choice.names.items())
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        print(f"--- # {number} of {len(found)}: {names}\n{text}", end="")


def _aside(line: str) -> None:
    """JSON stands alone on standard output."""
    print(line, file=sys.stderr)


def _show(folder: Path, done: str, *, as_json: bool) -> None:
    """The table of a run, and where to look further."""
    from nemo_bench.records.results import load_results
    from nemo_bench.report.terminal import show, terminal_table

    if as_json:
        print((folder / "leaderboard.json").read_text(encoding="utf-8"))
        return
    show(terminal_table(load_results(folder)))
    print(f"{done}\nreport:  {folder / 'report.html'}\nrecords: {folder}")


def _dry_run(choices: Sequence[CellConfig], as_json: bool) -> None:
    """Prints needs and cost; an error where something is missing, so that scripts can tell."""
    from nemo_bench.benchmark.dry_run import forecast

    expected = forecast(choices)
    missing = sum(need["state"] == "missing" for need in expected["needs"])
    if as_json:
        print(json.dumps(expected, indent=2))
    else:
        _print_forecast(expected)
    _warn_of_limits(choices)
    if missing:
        raise NemoBenchError(f"missing: {missing} of what the run needs, see above; nothing was started")


def _print_forecast(expected: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from nemo_bench.report.terminal import show

    rows, total = expected["cells"], expected["total"]
    width = max([80, *(len(row["cell"]) + 62 for row in rows)])
    console = Console(width=max(Console().width, width), markup=False, highlight=False)
    needs = Table("", "", Column("", overflow="fold"), box=None, show_header=False, pad_edge=False)
    together: dict[tuple[str, str, str], list[str]] = {}
    for need in expected["needs"]:
        if need["kind"] != "metric" or need["state"] != "there":
            together.setdefault((need["state"], need["kind"], need["note"]), []).append(need["what"])
    for (state, kind, note), names in together.items():
        needs.add_row(state, kind, f"{', '.join(names)}\n{note}".strip())
    for found in expected["families"]:
        needs.add_row("chosen" if found["known"] else "default", "settings", f"{found['method']} {found['text']}")
    console.print(needs, "")
    for file, about in expected["prompts"].items():
        console.print(f"{file}: {about['taken']:,} of {about['of']:,} prompts, the first of them:", soft_wrap=True)
        for prompt in about["first"]:
            text = textwrap.shorten(prompt["text"], 100, placeholder=" ...")
            console.print(f"  {prompt['id']}: {text}", soft_wrap=True)
    if expected["uncounted"]:
        console.print(f"{counted(expected['uncounted'], 'cell')} can't be counted before the files are there")
    if not rows:
        return
    stages = ("localize", "memorization", "generate", "score")
    titles = ("pending records", *stages, "UNet passes", "time")
    table = Table(*(Column(title, no_wrap=True) for title in titles))
    for row in rows:
        counts = [str(row["pending"].get(stage, "-")) for stage in stages]
        least = "≥ " if row["at_least"] else ""
        table.add_row(row["cell"], *counts, f"{least}{sum(row['passes'].values()):,}", _duration(row["seconds"], least))
    show(table)
    least, passes = ("≥ " if total["at_least"] else ""), total["passes"]
    verbs = {"memorization": "measure memorization"}
    counts = [f"{least * (s == 'localize')}{count:,} to {verbs.get(s, s)}" for s, count in passes.items()]
    console.print(f"UNet passes of one sample: {', '.join(counts)}")
    if least:
        console.print("≥: what a search takes depends on the prompt; no record of this model tells yet, so the least")
    for model, pace in expected["pace"].items():
        each = f"{1000 * pace['seconds_per_pass']:.3g} ms a pass"
        console.print(f"{model}: {each} in {pace['records']:,} finished records, on {', '.join(pace['devices'])}")
    console.print(f"time: {_duration(total['seconds'], least)}")


def _warn_of_limits(choices: Sequence[CellConfig]) -> None:
    """Says, apart from the results, that they are of the first prompts only."""
    found = {
        f"prompts.{name}={value}": None
        for choice in choices
        for name in ("limit", "calibration_limit")
        if (value := getattr(choice.settings.prompts, name)) is not None
    }
    if found:
        _aside(f"{', '.join(found)}: of each file the first prompts only, for a try; these numbers are no results")


def _duration(seconds: float | None, least: str) -> str:
    """Seconds for people; a question mark before the first records."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{least}{seconds:.0f} s"
    return f"{least}{seconds / 60:.0f} min" if seconds < 5400 else f"{least}{seconds / 3600:,.1f} h"


def _calibrate(options: argparse.Namespace) -> None:
    from nemo_bench.config import grid

    overrides = options.overrides
    if not any(word.startswith("method=") for word in overrides):
        overrides = [*overrides, "method=nemo"]
    choices = grid(overrides, options.conf)
    if options.cfg:
        _print_settings(choices, options.json)
        return
    from nemo_bench.benchmark.calibrate import calibrate
    from nemo_bench.benchmark.plan import Planner
    from nemo_bench.benchmark.processes import is_main

    planner = Planner()
    cells = planner.plan([replace(choice, settings=replace(choice.settings, metrics={})) for choice in choices])
    planner.check()
    results = calibrate(cells, progress=not options.json)
    if not is_main():
        return
    if options.json:
        print(json.dumps([result.model_dump() for result in results], indent=2))
        return
    for result in results:
        failed = f", {result.failed} more failed" if result.failed else ""
        print(f"{result.model}: threshold {result.threshold:.4f}, {result.prompts} general prompts{failed}")
        if result.general_prompts:
            print(f"general prompts: {result.general_prompts}")
        if result.mean is not None:
            print(f"pairwise scores: {result.mean:.4f} ± {result.std:.4f}")
            for name, gate in (("pairs", result), ("maxima", result.maxima)):
                passed = gate.passed_gate or 0
                print(
                    f"gate={name}: above {gate.threshold:.4f} are {passed} of these {result.prompts} prompts "
                    f"({passed / result.prompts:.0%}), though none is memorized"
                )
        print(f"statistics: {result.statistics}")
        if result.folder:
            print(f"records: {result.folder}")


def _ls(options: argparse.Namespace) -> None:
    from rich.table import Column, Table

    from nemo_bench.config import GROUPS, describe_options, explain_option, overview, short
    from nemo_bench.report.terminal import show

    if options.name:
        print(explain_option(options.group, options.name, options.conf))
        return
    if options.json:
        groups = [options.group] if options.group else [g for g in GROUPS if g not in ("trainer", "logger")]
        print(json.dumps([entry for group in groups for entry in describe_options(group, options.conf)], indent=2))
        return
    names = Column("name", no_wrap=True)
    if options.group:
        table = Table(names, "summary", "source", box=None, pad_edge=False)
        for entry in describe_options(options.group, options.conf):
            table.add_row(entry["name"], entry["summary"], short(entry["citation"]))
    else:
        # Names first: where the table is shown in parts, every part has them.
        table = Table(names, Column("group", no_wrap=True), "summary", box=None, pad_edge=False)
        for entry in overview(options.conf):
            table.add_row(*(entry[column] for column in ("name", "group", "summary")))
    show(table)
    if not options.group:
        print("nemo-bench ls GROUP names sources, nemo-bench ls GROUP NAME what can be set")


def _report(options: argparse.Namespace) -> None:
    from nemo_bench.records.results import load_detections, load_results
    from nemo_bench.records.store import read_run
    from nemo_bench.report import write_report
    from nemo_bench.report.detection import write_detection
    from nemo_bench.report.terminal import show, terminal_detection, terminal_table

    folder = options.folder
    if (folder / "detection.json").is_file():
        detectors = load_detections(folder)
        page = write_detection(detectors)
        show(*terminal_detection(detectors))
        print(page)
        if not read_run(folder).cells:
            return
    results = load_results(folder)
    write_report(results)
    show(terminal_table(results))
    print(folder / "report.html")


def _track(options: argparse.Namespace) -> None:
    from nemo_bench.config import logger_settings
    from nemo_bench.records.results import load_results
    from nemo_bench.tracking import track

    folder, cells = options.folder, None
    if (folder / "spec.json").is_file() and not (folder / "run.json").is_file():
        folder, cells = folder.parent, [folder.name]
    track(load_results(folder), logger_settings(options.overrides), cells=cells, again=options.again)


def _export(options: argparse.Namespace) -> None:
    from nemo_bench.benchmark.export import export

    neurons = export(options.cell, options.folder, options.prompt)
    print(f"{options.folder}: {neurons.count} neurons switched off for good")


def _score(options: argparse.Namespace) -> None:
    from nemo_bench.benchmark.pending import check_images
    from nemo_bench.benchmark.processes import is_main
    from nemo_bench.benchmark.rescore import cells_of, score

    start = time.perf_counter()
    say, progress = (_aside, False) if options.json else (print, True)
    cells = cells_of(
        options.folder, options.overrides, conf=options.conf, mapping=options.map, say=say, progress=progress
    )
    folder = score(cells, options.line, say, progress=progress)
    if is_main():
        _show(folder, f"{time.perf_counter() - start:.0f} s", as_json=options.json)
        check_images(cells)


def _audit(options: argparse.Namespace) -> None:
    from nemo_bench.benchmark.audit import audit, cells_of
    from nemo_bench.benchmark.processes import is_main
    from nemo_bench.records.results import load_results
    from nemo_bench.report.audit import audits_of
    from nemo_bench.report.terminal import show, terminal_audits

    start = time.perf_counter()
    say = _aside if options.json else print
    cells = cells_of(options.folder, options.overrides, options.cell, conf=options.conf, say=say)
    folder = audit(cells, options.line, progress=not options.json)
    if not is_main():
        return
    audits = audits_of(load_results(folder))
    if options.json:
        print(
            json.dumps([{"cell": found.cell.name, **found.audit.model_dump(mode="json")} for found in audits], indent=2)
        )
        return
    show(*terminal_audits(audits))
    print(f"{time.perf_counter() - start:.0f} s\nreport:   {folder / 'report.html'}")
    for cell in cells:
        print(f"pictures: {cell.store.folder / 'audit'}")


def _references(options: argparse.Namespace) -> None:
    from collections import Counter

    from nemo_bench.config import quoted, shell_word
    from nemo_bench.prompts import MANIFEST
    from nemo_bench.prompts.download import Limits, fetch

    given = {name: getattr(options, name) for name, *_ in LIMITS if getattr(options, name) is not None}
    summary = fetch(options.lists, options.folder, Limits(**given, private=options.private), progress=not options.json)
    if options.json:
        print(json.dumps(summary, indent=2))
        return
    dead, same = summary["dead"], summary["same"]
    print(f"{summary['links']} links: {summary['fetched']} fetched, {summary['kept']} kept, {len(dead)} dead")
    for why, count in Counter(entry["why"] for entry in dead).most_common():
        print(f"{count:>6}  {why}")
    for entry in dead[:LISTED_LINKS]:
        print(f"dead: {entry['url']}")
    if len(dead) > LISTED_LINKS:
        print(f"dead: ... all of them are in {options.folder / MANIFEST}")
    if healing := sum(entry["may_heal"] for entry in dead):
        print(f"{healing} of the dead links may heal; the same command tries those again")
    if same:
        print(f"{sum(map(len, same))} links gave {len(same)} files; a file of many links may stand in for lost images:")
        print("\n".join(f"same: {len(links)} x {links[0]}" for links in sorted(same, key=len, reverse=True)[:3]))
    print(f"{summary['prompts_without_reference']} of {summary['prompts']} prompts have no training image left")
    files = shlex.quote(f"prompts.files=[{','.join(map(quoted, options.lists))}]")
    print(f"use them: nemo-bench run {files} {shell_word('prompts.references', str(options.folder))}")


def _train(options: argparse.Namespace) -> None:
    from nemo_bench.config import overridden
    from nemo_bench.planted.training import TrainSpec, train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(train(overridden(options.overrides, TrainSpec)))


if __name__ == "__main__":
    sys.exit(main())
