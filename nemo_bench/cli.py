"""The command line: ``nemo-bench COMMAND [key=value ...]``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nemo_bench.environment import prepare_process
from nemo_bench.errors import ConfigError, NemoBenchError, StoreError, did_you_mean, shortened

if TYPE_CHECKING:
    from nemo_bench.config import CellConfig, LoggerSettings, RunSettings
    from nemo_bench.planted.spec import TrainSpec


def _shard(text: str) -> tuple[int, int]:
    """A share of the cells, ``i/n``."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected i/n, such as 1/4 to 4/4, given '{text}'")
    return int(found[1]), int(found[2])


_TYPES = {"path": Path, "int": int, "float": float, "shard": _shard}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, by default the words that the program was started with.

    Gives 0, 1 after an error that was explained, or 130 where it was stopped.
    """
    if arguments is None:
        prepare_process()
        arguments = sys.argv[1:]
    options = _options(arguments)
    from nemo_bench.benchmark.processes import follow_starter, stop_at_signals

    follow_starter()
    stop_at_signals()
    _show_messages(options)
    try:
        if options.reads:  # is checked before torch loads
            from nemo_bench.records.io import check_folder

            argument, wanted = options.reads
            check_folder(getattr(options, argument), wanted)
        options.command(options)
        sys.stdout.flush()  # here, where an error is explained, and not as Python ends
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


def _show_messages(options: argparse.Namespace) -> None:
    """Prints messages of the package: to standard error where JSON stands alone on standard output."""
    from nemo_bench.benchmark.processes import is_main

    # Only what was computed says how it went, so only its commands can be quiet.
    quiet, verbose = (getattr(options, name, False) for name in ("quiet", "verbose"))
    handler = logging.StreamHandler(sys.stderr if getattr(options, "json", False) else sys.stdout)
    handler.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logger = logging.getLogger("nemo_bench")
    logger.handlers = [handler] if is_main() else []
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


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
    """The commands of ``cli.yaml``; that of ``run`` is :func:`_run`, and so on."""
    about = yaml.safe_load(Path(__file__).with_name("cli.yaml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(
        "nemo-bench",
        description=about["description"],
        epilog=about["epilog"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nemo-bench {version('nemo-bench')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name_of_command")
    for name, command in about["commands"].items():
        sub = commands.add_parser(name, help=command["help"], description=command["help"])
        goes_on, reads = command.get("goes_on", False), command.get("reads")
        sub.set_defaults(command=globals()[f"_{name}"], goes_on=goes_on, reads=reads)
        messages = about["messages"] if goes_on else {}
        for argument, words in {**command["arguments"], **messages}.items():
            kind = {"type": _TYPES[words["type"]]} if "type" in words else {}
            added = sub.add_argument(argument, **{**words, **kind})
            if argument == "overrides" and "--cfg" in command["arguments"]:
                added.completer = _settings_so_far  # type: ignore[attr-defined] # read by argcomplete
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
    from nemo_bench.benchmark.launch import check_launcher, printed

    settings = choices[0].settings
    if options.print:
        print(printed(options.overrides, options.conf, settings), end="")
        return
    check_launcher(settings, options.shard)
    from nemo_bench.benchmark.pending import check_failures, is_complete, is_finished, pending_work, track_cells
    from nemo_bench.benchmark.plan import plan
    from nemo_bench.benchmark.processes import is_main, was_started
    from nemo_bench.records.results import load_results

    cells = plan(choices)
    start = time.perf_counter()
    folder = cells[0].store.folder.parent
    pending = sum(sum(records.values()) for _, records in pending_work(cells))
    failed: NemoBenchError | None = None
    # A process that was started by another one does as that one does.
    if not was_started() and is_complete(cells):
        logger = cells[0].config.settings.logger
        if is_main() and (logger.wandb or logger.csv or logger.tensorboard):
            track_cells(load_results(folder), cells)
    else:
        from nemo_bench.benchmark.launch.follow import launch
        from nemo_bench.benchmark.run import run  # with it Lightning loads

        try:
            if settings.launcher.kind == "local":
                run(cells, options.line, progress=not options.quiet, shard=options.shard)
            else:
                launch(cells, options.overrides, options.conf)
        except NemoBenchError as error:
            if not is_main() or not any(is_finished(cell.store.folder) for cell in cells):
                raise
            failed = error  # the table of the others comes first
    if options.shard and not any(is_finished(cell.store.folder) for cell in cells):
        print(f"--shard {options.shard[0]}/{options.shard[1]}: none of the {len(cells)} cells is in this share")
    elif is_main():
        done = f"{pending} records computed" if pending else "everything was done already"
        _show(folder, f"{done}, {time.perf_counter() - start:.0f} s", as_json=options.json)
        _warn_of_limits(choices)
        if failed:
            raise failed
        check_failures(cells)


def _detect(options: argparse.Namespace) -> None:
    from nemo_bench.config import detector_grid

    choices = detector_grid(options.overrides, options.conf)  # before torch loads, so that mistakes are said at once
    if options.cfg:
        _print_settings(choices, options.json)
        return
    from nemo_bench.benchmark import detect as detection
    from nemo_bench.benchmark.pending import check_failures
    from nemo_bench.benchmark.processes import is_main
    from nemo_bench.records.results import load_detections
    from nemo_bench.report.console import show
    from nemo_bench.report.terminal import terminal_detection

    cells = detection.plan(choices)
    start = time.perf_counter()
    is_done = not detection.is_pending(cells)
    folder = detection.detect(cells, options.line, progress=not options.quiet)
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
        check_failures(cells)


def _localize(options: argparse.Namespace) -> None:
    from nemo_bench.config import localizer_grid

    choices = localizer_grid(options.overrides, options.conf)  # before torch loads, so that mistakes are said at once
    if options.cfg:
        _print_settings(choices, options.json)
        return
    from nemo_bench.benchmark import localize as localizers

    if options.dry_run:
        _dry_run(localizers.as_methods(choices), options.json)
        return
    from nemo_bench.benchmark.pending import check_failures
    from nemo_bench.benchmark.processes import is_main
    from nemo_bench.records.io import read_file
    from nemo_bench.records.schema import LocalizerTable
    from nemo_bench.report.console import show
    from nemo_bench.report.localizers import FILES
    from nemo_bench.report.terminal import terminal_localizers

    cells = localizers.plan(choices)
    start = time.perf_counter()
    folder = localizers.localize(cells, options.line, progress=not options.quiet)
    if not is_main():
        return
    if options.json:
        print((folder / FILES[0]).read_text(encoding="utf-8"))
    else:
        show(*terminal_localizers(read_file(folder / FILES[0], LocalizerTable)))
        print(f"{time.perf_counter() - start:.0f} s\nreport:  {folder / 'localizers.html'}\nrecords: {folder}")
    _warn_of_limits(choices)
    check_failures(cells)


def _regions(options: argparse.Namespace) -> None:
    from nemo_bench.config import region_grid

    choices = region_grid(options.overrides, options.conf)  # before torch loads, so that mistakes are said at once
    if options.cfg:
        _print_settings(choices, options.json)
        return
    from nemo_bench.benchmark import regions
    from nemo_bench.benchmark.pending import check_failures
    from nemo_bench.benchmark.processes import is_main
    from nemo_bench.records.io import read_file
    from nemo_bench.records.schema import RegionTable
    from nemo_bench.report.console import show, show_region_forecast
    from nemo_bench.report.regions import FILES
    from nemo_bench.report.terminal import terminal_regions

    cells = regions.plan(choices)
    if options.dry_run:
        expected = regions.forecast(cells)
        if options.json:
            print(json.dumps(expected, indent=2))
        else:
            show_region_forecast(expected)
        return
    start = time.perf_counter()
    folder = regions.localize_regions(cells, options.line, progress=not options.quiet)
    if not is_main():
        return
    if options.json:
        print((folder / FILES[0]).read_text(encoding="utf-8"))
    else:
        show(*terminal_regions(read_file(folder / FILES[0], RegionTable)))
        print(f"{time.perf_counter() - start:.0f} s\nreport:  {folder / FILES[3]}\nrecords: {folder}")
    _warn_of_limits(choices)
    check_failures([cell for cell, _ in cells])


def _similarity(options: argparse.Namespace) -> None:
    from nemo_bench.config import similarity_settings

    settings = similarity_settings(options.overrides, options.conf)  # before torch loads
    from nemo_bench.benchmark.copies import compare, open_comparison, read_pairs
    from nemo_bench.records.io import read_file
    from nemo_bench.records.schema import SimilarityTable
    from nemo_bench.report.console import show
    from nemo_bench.report.copies import FILES
    from nemo_bench.report.terminal import terminal_similarity

    start = time.perf_counter()
    if options.pairs is None and settings.model.family != "planted":
        raise ConfigError("only the pictures of the embedded models are known: give model=planted_routed or --pairs")
    pairs = None if options.pairs is None else read_pairs(options.pairs)  # before a folder is made
    comparison, source = open_comparison(settings), f"Pairs of {options.pairs}"
    if pairs is None:
        source = "Pairs of the embedded model and its world"
        pairs = read_pairs(_planted_pairs(settings, comparison.folder))
    page = compare(comparison, pairs, source, progress=not options.quiet)
    if options.json:
        print((page.parent / FILES[0]).read_text(encoding="utf-8"))
    else:
        show(terminal_similarity(read_file(page.parent / FILES[0], SimilarityTable)))
        print(f"{time.perf_counter() - start:.0f} s\nreport:  {page}")


def _planted_pairs(settings: RunSettings, folder: Path) -> Path:
    """Makes the pairs of the embedded model in a run's folder, unless they are there, and returns theirs."""
    from nemo_bench.benchmark.runner import load_model
    from nemo_bench.config import resolve
    from nemo_bench.planted.copies import write_pairs
    from nemo_bench.prompts import read_prompts
    from nemo_bench.records.data import PAIRS_FILE
    from nemo_bench.records.io import digest

    pairs = folder / f"pairs-{digest([asdict(settings.model), settings.seeds], 8)}"
    if not (pairs / PAIRS_FILE).is_file():
        general = read_prompts(resolve("package:planted/prompts/general.jsonl"))
        write_pairs(pairs, load_model(settings.model), general, settings.seeds)
    return pairs


def _print_settings(choices: Sequence[CellConfig], as_json: bool) -> None:
    """The settings of each cell in full, as YAML documents or a list of objects."""
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
    from nemo_bench.report.console import show
    from nemo_bench.report.memsinks import has_sinks
    from nemo_bench.report.terminal import terminal_table

    if as_json:
        print((folder / "leaderboard.json").read_text(encoding="utf-8"))
        return
    results = load_results(folder)
    show(terminal_table(results))
    sinks = f"\nsinks:   {folder / 'memsinks.html'}" if has_sinks(results) else ""
    print(f"{done}\nreport:  {folder / 'report.html'}{sinks}\nrecords: {folder}")


def _dry_run(choices: Sequence[CellConfig], as_json: bool) -> None:
    """Prints needs and cost; an error where something is missing, so that scripts can tell."""
    from nemo_bench.benchmark.dry_run import forecast
    from nemo_bench.report.console import show_forecast

    expected = forecast(choices)
    missing = sum(need["state"] == "missing" for need in expected["needs"])
    if as_json:
        print(json.dumps(expected, indent=2))
    else:
        show_forecast(expected)
    _warn_of_limits(choices)
    if missing:
        raise NemoBenchError(f"missing: {missing} of what the run needs, see above; nothing was started")


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


def _calibrate(options: argparse.Namespace) -> None:
    from nemo_bench.config import grid

    overrides = options.overrides
    if not any(word.startswith("method=") for word in overrides):
        overrides = [*overrides, "method=nemo"]
    choices = grid(overrides, options.conf)
    if choices[0].settings.launcher.kind != "local":
        raise ConfigError("nemo-bench calibrate works in this process alone; leave out launcher=...")
    if options.cfg:
        _print_settings(choices, options.json)
        return
    from nemo_bench.benchmark.calibrate import calibrate
    from nemo_bench.benchmark.plan import plan
    from nemo_bench.benchmark.processes import is_main
    from nemo_bench.report.templates import render

    cells = plan([replace(choice, settings=replace(choice.settings, metrics={})) for choice in choices])
    results = calibrate(cells, progress=not options.quiet)
    if not is_main():
        return
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(render("calibrate.txt.jinja", results=results), end="")


def _ls(options: argparse.Namespace) -> None:
    from nemo_bench.config.groups import GROUPS, HOW
    from nemo_bench.config.listing import describe_options, explain_option, overview, short
    from nemo_bench.report.console import show_entries

    if options.name:
        print(explain_option(options.group, options.name, options.conf))
    elif options.json:
        groups = [options.group] if options.group else [g for g in GROUPS if g not in HOW]
        print(json.dumps([entry for group in groups for entry in describe_options(group, options.conf)], indent=2))
    elif options.group:
        entries = describe_options(options.group, options.conf)
        show_entries([{**e, "source": short(e["citation"])} for e in entries], ("name", "summary", "source"))
    else:
        # Names first: where the table is shown in parts, every part has them.
        show_entries(overview(options.conf), ("name", "group", "summary"))
        print("nemo-bench ls GROUP names sources, nemo-bench ls GROUP NAME what can be set")


def _report(options: argparse.Namespace) -> None:
    from nemo_bench.benchmark.pending import write_pages
    from nemo_bench.records.io import read_file
    from nemo_bench.records.lease import Leases
    from nemo_bench.records.results import load_detections, load_run
    from nemo_bench.records.schema import LocalizerTable, RegionTable, SimilarityTable
    from nemo_bench.report.console import show
    from nemo_bench.report.copies import FILES as SIMILARITY_FILES
    from nemo_bench.report.copies import write_similarity
    from nemo_bench.report.detection import write_detection
    from nemo_bench.report.localizers import localized
    from nemo_bench.report.memsinks import has_sinks
    from nemo_bench.report.regions import FILES as REGION_FILES
    from nemo_bench.report.regions import write_regions
    from nemo_bench.report.terminal import (
        terminal_detection,
        terminal_localizers,
        terminal_regions,
        terminal_similarity,
        terminal_table,
    )

    folder = options.folder
    run = load_run(folder)  # before the lease, which makes a folder that is not there
    with Leases().owning(folder):
        if (folder / SIMILARITY_FILES[0]).is_file():
            similarity = read_file(folder / SIMILARITY_FILES[0], SimilarityTable)
            show(terminal_similarity(similarity))
            print(write_similarity(folder, similarity))
            if not run.cells and not (folder / "detection.json").is_file():
                return
        if (folder / "detection.json").is_file():
            detectors = load_detections(folder)
            page = write_detection(detectors)
            show(*terminal_detection(detectors))
            print(page)
            if (folder / REGION_FILES[0]).is_file():
                table = read_file(folder / REGION_FILES[0], RegionTable)
                show(*terminal_regions(table))
                print(write_regions(folder, table))
            if not run.cells:
                return
        results = write_pages(folder)
    show(terminal_table(results))
    if localized(results):
        show(*terminal_localizers(read_file(folder / "localizers.json", LocalizerTable)))
        print(folder / "localizers.html")
    if has_sinks(results):
        print(folder / "memsinks.html")
    print(folder / "report.html")


def _track(options: argparse.Namespace) -> None:
    from nemo_bench.config import logger_settings
    from nemo_bench.records.results import load_results
    from nemo_bench.tracking import track

    folder, cells = options.folder, None
    if (folder / "spec.json").is_file() and not (folder / "run.json").is_file():
        folder, cells = folder.parent, [folder.name]
    track(load_results(folder), logger_settings(options.overrides), cells=cells, again=options.again)


def _status(options: argparse.Namespace) -> None:
    from nemo_bench.benchmark.status import read_status
    from nemo_bench.report.console import show_status

    found = read_status(options.folder)
    if options.json:
        print(json.dumps([asdict(cell) for cell in found], indent=2))
    else:
        show_status([asdict(cell) for cell in found])


def _export(options: argparse.Namespace) -> None:
    from nemo_bench.benchmark.export import export

    neurons = export(options.cell, options.folder, options.prompt)
    print(f"{options.folder}: {neurons.count} neurons switched off for good")


def _score(options: argparse.Namespace) -> None:
    from nemo_bench.benchmark.pending import check_failures
    from nemo_bench.benchmark.processes import is_main
    from nemo_bench.benchmark.rescore import cells_of, score

    start = time.perf_counter()
    progress = not options.quiet
    cells = cells_of(options.folder, options.overrides, conf=options.conf, mapping=options.map, progress=progress)
    folder = score(cells, options.line, progress=progress)
    if is_main():
        _show(folder, f"{time.perf_counter() - start:.0f} s", as_json=options.json)
        check_failures(cells)


def _audit(options: argparse.Namespace) -> None:
    from nemo_bench.benchmark.audit import audit, cells_of
    from nemo_bench.benchmark.processes import is_main
    from nemo_bench.records.results import load_results
    from nemo_bench.report.audit import audits_of
    from nemo_bench.report.console import show
    from nemo_bench.report.terminal import terminal_audits

    start = time.perf_counter()
    cells = cells_of(options.folder, options.overrides, options.cell, conf=options.conf)
    folder = audit(cells, options.line, progress=not options.quiet)
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


def _verify(options: argparse.Namespace) -> None:
    from itertools import groupby
    from operator import attrgetter

    from nemo_bench.benchmark.verify import verify

    number = {} if options.records is None else {"records": options.records}
    found = verify(options.folder, options.overrides, conf=options.conf, progress=not options.json, **number)
    if options.json:
        print(json.dumps([asdict(comparison) for comparison in found], indent=2))
    else:
        for cell, rows in groupby(found, key=attrgetter("cell")):
            print(cell)
            for row in rows:
                largest = "not of numbers" if row.difference is None else f"{row.difference:.2g}"
                print(
                    f"  {row.stage:<12} {row.recomputed} recomputed, {row.equal} equal bit by bit, "
                    f"largest difference {largest}; up to {row.tolerance:g} passes"
                )
    if wrong := [f"{row.cell}, {row.stage}: {'; '.join(row.differing)}" for row in found if row.differing]:
        raise StoreError("\n  ".join(["records differ from what this machine computes by more than passes:", *wrong]))


def _references(options: argparse.Namespace) -> None:
    from collections import Counter

    from nemo_bench.config.overrides import quoted, shell_word
    from nemo_bench.prompts import MANIFEST
    from nemo_bench.prompts.download import Limits, fetch
    from nemo_bench.report.templates import render

    given = {field.name: getattr(options, field.name, None) for field in fields(Limits)}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    summary = fetch(options.lists, options.folder, limits, progress=not options.json)
    if options.json:
        print(json.dumps(summary, indent=2))
        return
    files = shlex.quote(f"prompts.files=[{','.join(map(quoted, options.lists))}]")
    words = {
        "manifest": options.folder / MANIFEST,
        "whys": Counter(entry["why"] for entry in summary["dead"]).most_common(),
        "largest": sorted(summary["same"], key=len, reverse=True)[:3],
        "command": f"nemo-bench run {files} {shell_word('prompts.references', str(options.folder))}",
    }
    print(render("references.txt.jinja", **summary, **words))


def _train(options: argparse.Namespace) -> None:
    from nemo_bench.planted.training import train
    from nemo_bench.tracking import training_loggers

    spec, loggers = training_settings(options.overrides)
    print(train(spec, training_loggers(loggers, spec.out, spec.recipe)))


def training_settings(words: Sequence[str]) -> tuple[TrainSpec, LoggerSettings]:
    """Settings of a training and of its loggers, which are those of ``logger=csv`` by default."""
    from nemo_bench.config import logger_settings, overridden
    from nemo_bench.config.schema import words_within
    from nemo_bench.planted.spec import TrainSpec

    of_loggers = words_within(words, ["logger"])
    spec = overridden([word for word in words if word not in of_loggers], TrainSpec)
    return spec, logger_settings(of_loggers or ["logger=csv"])


if __name__ == "__main__":
    sys.exit(main())
