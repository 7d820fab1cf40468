"""Weights & Biases: one run a cell; nothing else imports wandb."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from wandb.sdk.lib.wbauth import read_netrc_auth

from nemo_bench.config import LoggerSettings
from nemo_bench.errors import TrackingError, counted
from nemo_bench.records.io import digest, read_json, write_json
from nemo_bench.tracking.content import PICTURES, Entry


def tell(
    entries: Sequence[Entry],
    settings: LoggerSettings,
    *,
    again: bool,
    in_sweep: bool,
    say: Callable[[str], None],
) -> None:
    """Makes or continues the W&B run of every cell: config, summary, tables with pictures, charts, an artifact.

    A run's id follows from run and cell, or is that of the sweep agent, and is kept beside the records; a cell that was
    told already and has not changed since is left alone.

    Args:
        entries: Cells of one run.
        settings: Project, entity, mode, time-out and number of prompts with pictures.
        again: Tell what has not changed as well.
        in_sweep: Whether the one cell continues the W&B run that a sweep agent has opened.
        say: Where single lines go.

    Raises:
        TrackingError: W&B failed at a cell, in whatever way; the cells after it are not tried.
    """
    mode, why = _mode(settings.mode)
    say(f"W&B: {mode}, {why}")
    if mode == "disabled":
        return
    told = 0
    for entry in entries:
        marker = entry.folder / "tracked.json"
        before = read_json(marker) if marker.exists() else {}
        own = before.get("id") or digest([entry.token, entry.cell.name])
        identity = os.environ["WANDB_RUN_ID"] if in_sweep else own
        place = {"id": identity, "project": settings.project, "entity": settings.entity, "mode": mode}
        wanted = {**place, "results": entry.digest}
        if not again and wanted == {key: before.get(key) for key in wanted}:
            continue
        try:
            url = _tell(entry, settings, identity, mode, in_sweep)
        except Exception as error:  # wandb and its service raise errors of many kinds
            raise TrackingError(f"{entry.cell.name}: {str(error) or type(error).__name__}") from error
        write_json(marker, {**wanted, "url": url})
        told += 1
        if url:
            say(f"W&B: {url}")
    run = entries[0].folder.parent
    if told < len(entries):
        say(f"W&B: {counted(len(entries) - told, 'cell')} unchanged since they were tracked ({mode})")
    if told and mode == "offline":
        say(f"W&B (offline): {run}/*/wandb; nemo-bench track {run} logger.mode=online uploads it, from any machine")


def _tell(entry: Entry, settings: LoggerSettings, identity: str, mode: Any, in_sweep: bool) -> str | None:
    cell, start = entry.cell, entry.cell.starts[-1]
    # A sweep agent has decided these by itself; wandb warns of every one that is given again.
    place: dict[str, Any] = {
        "project": settings.project,
        "entity": settings.entity,
        "id": identity,
        "resume": "allow",
    }
    with (
        _staged_in(entry.folder / "wandb"),
        wandb.init(
            **({} if in_sweep else place),
            name=cell.name[:64],
            group=entry.group[:64],
            job_type="benchmark",
            tags=list(dict.fromkeys(name[:64] for name in (cell.model, cell.method, cell.prompt_list))),
            notes=start["command"],
            config=entry.config,
            dir=entry.folder,
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_disable_stats=True,
                init_timeout=settings.timeout,
                finish_timeout=settings.timeout,
                finish_timeout_raises=True,
            ),
        ) as run,
    ):
        run.log({**entry.means, "prompts": _prompts(entry, settings.thumbnails), **_charts(entry)})
        run.summary.update(entry.row)
        run.log_artifact(_artifact(entry))
    return None if run.offline else run.url


def _mode(asked: str | None) -> tuple[Any, str]:
    """The mode that runs are made in, and why; where nobody chose one, online if wandb finds a key for its server.

    Raises:
        TrackingError: Runs are to be online, and there is no key; wandb would ask for one in the middle of the run.
    """
    own = wandb.setup().settings  # of its files and of the environment
    if asked:
        mode, chosen = asked, "by logger.mode"
    elif "mode" in own.model_fields_set:
        by = "WANDB_MODE" if os.environ.get("WANDB_MODE") else "wandb's settings file"
        mode, chosen = own.mode, f"by {by}"
    else:
        mode, chosen = None, ""
    if mode in ("offline", "dryrun", "disabled"):
        return mode, chosen
    key = _key(own)
    if key:
        return mode or "online", f"{own.base_url}, key from {key}"
    if mode:
        raise TrackingError(f"{mode} {chosen}, but there is no key for {own.base_url}; {_GET_KEY}")
    return "offline", f"no key for {own.base_url}; {_GET_KEY}"


_GET_KEY = "`wandb login` keeps one, or set WANDB_API_KEY"


def _key(own: wandb.Settings) -> str | None:
    """Where wandb finds the key for its server, in the order in which it looks; None where there is none."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            return name
    if read_netrc_auth(host=own.base_url):
        return "netrc"
    return "wandb's settings" if own.api_key or own.identity_token_file else None


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Keeps W&B's staged media and artifacts beside the run."""
    wanted = {"WANDB_DATA_DIR": str(folder.resolve()), "WANDB_CACHE_DIR": str((folder / "cache").resolve())}
    before = {name: os.environ.get(name) for name in wanted}
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _prompts(entry: Entry, thumbnails: int) -> wandb.Table:
    metrics = list(entry.metrics["metrics"])
    table = wandb.Table(columns=["prompt", "text", "group", *PICTURES, "neurons by layer", *metrics])
    for number, prompt in enumerate(entry.cell.prompts):
        pictures = entry.pictures(prompt) if number < thumbnails else {}
        table.add_data(
            prompt.id,
            prompt.text,
            prompt.group,
            *(wandb.Image(pictures[name]) if name in pictures else None for name in PICTURES),
            json.dumps(dict(entry.cell.outcomes[prompt.id].neurons)),
            *(entry.value(prompt, metric) for metric in metrics),
        )
    return table


def _charts(entry: Entry) -> dict[str, Any]:
    """Custom charts; in a workspace each one lays the chosen runs over each other."""
    return {**_curves(entry), **_tradeoff(entry), **_neurons(entry)}


def _curves(entry: Entry) -> dict[str, Any]:
    charts = {}
    for name, points in entry.detector_curves.items():
        table = wandb.Table(columns=["class", "fpr", "tpr"], data=[[entry.cell.title, x, y] for x, y in points])
        title = f"ROC: {entry.metrics['detection'][name].get('title', name)}"
        axes = {"x-axis-title": "False positive rate", "y-axis-title": "True positive rate"}
        fields = {"x": "fpr", "y": "tpr", "class": "class"}
        # wandb.plot.roc_curve draws the same, but has scikit-learn compute the points.
        charts[f"detection/roc/{name}"] = wandb.plot_table(
            "wandb/area-under-curve/v0", table, fields, {"title": title, **axes}
        )
    return charts


def _tradeoff(entry: Entry) -> dict[str, Any]:
    if not entry.tradeoff:
        return {}
    x, y = entry.tradeoff
    aggregates, prompts = entry.metrics["aggregates"], entry.cell.prompts
    means = [[entry.cell.title, g, s[x]["mean"], s[y]["mean"]] for g, s in aggregates.items() if x in s and y in s]
    rows = [[p.id, p.group, entry.value(p, x), entry.value(p, y)] for p in prompts]
    by_group = wandb.Table(columns=["method", "group", x, y], data=means)
    by_prompt = wandb.Table(columns=["prompt", "group", x, y], data=[row for row in rows if None not in row])
    return {
        "tradeoff/groups": wandb.plot.scatter(by_group, x, y, "Trade-off, mean of each group"),
        "tradeoff/prompts": wandb.plot.scatter(by_prompt, x, y, "Trade-off, one point a prompt"),
    }


def _neurons(entry: Entry) -> dict[str, Any]:
    outcomes = entry.cell.outcomes
    if not any(outcome.neurons for outcome in outcomes.values()):
        return {}
    counts = [[p.id, p.group, outcomes[p.id].neurons.count] for p in entry.cell.prompts]
    by_prompt = wandb.Table(columns=["prompt", "group", "neurons"], data=counts)
    by_layer = wandb.Table(columns=["layer", "width", "neurons"], data=[list(row) for row in entry.neurons_by_layer()])
    return {
        "neurons/per_prompt": wandb.plot.histogram(by_prompt, "neurons", "Neurons per prompt"),
        "neurons/per_layer": wandb.plot.bar(by_layer, "layer", "neurons", "Neurons per layer, mean over prompts"),
    }


def _artifact(entry: Entry) -> wandb.Artifact:
    """Records, neurons and what they belong to; the same results always make the same content, so no new version."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"records-{entry.cell.name}")
    artifact = wandb.Artifact(name[:128], type="records", metadata={"cell": entry.cell.name})
    folder = entry.folder
    files = [*folder.glob("records/[!.]*.jsonl"), *folder.glob("neurons/[!.]*.json")]
    names = ("spec.json", "metrics.json", "layers.json", "prompts.jsonl", "neurons.csv")
    for file in sorted([*files, *(folder / name for name in names if (folder / name).is_file())]):
        artifact.add_file(str(file), file.relative_to(folder).as_posix())
    return artifact
