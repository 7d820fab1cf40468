"""Weights & Biases: one run a cell; nothing else imports wandb."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from wandb.sdk.lib.wbauth import read_netrc_auth

from nemo_bench.config import LoggerSettings
from nemo_bench.errors import TrackingError, counted
from nemo_bench.records.io import digest, read_file, write_json
from nemo_bench.records.schema import Tracked
from nemo_bench.tracking import sweep_trial
from nemo_bench.tracking.logged import PICTURES, LoggedCell

log = logging.getLogger(__name__)


def log_wandb(cells: Sequence[LoggedCell], settings: LoggerSettings, again: bool) -> None:
    """Makes or continues the W&B run of every cell: config, summary, tables with pictures, charts, an artifact.

    A run's id follows from run and cell, or is that of the sweep agent, whose trial is then the only cell logged, and
    is kept beside the records; a cell without a change since it was logged is left alone. TrackingError where W&B
    failed at a cell, in whatever way; the cells after it are not tried.
    """
    trial = sweep_trial({cell.results.name: cell.results.method for cell in cells})
    if trial:
        cells = [cell for cell in cells if cell.results.name == trial]
    mode, why = _mode(settings.mode)
    log.info("W&B: %s, %s", mode, why)
    if mode == "disabled":
        return
    logged = 0
    for cell in cells:
        file = cell.folder / "tracked.json"
        before = read_file(file, Tracked) if file.exists() else None
        if trial:
            identity = os.environ["WANDB_RUN_ID"]
        else:
            identity = before.id if before else digest([cell.run.token, cell.results.name])
        tracked = Tracked(
            id=identity, project=settings.project, entity=settings.entity, mode=mode, results=cell.digest
        )  # fmt: skip
        if before and not again and tracked == before.model_copy(update={"url": None}):
            continue
        try:
            url = _log(cell, settings, tracked, in_sweep=trial is not None)
        except Exception as error:  # wandb and its service raise errors of many kinds
            raise TrackingError(f"{cell.results.name}: {str(error) or type(error).__name__}") from error
        write_json(file, tracked.model_copy(update={"url": url}))
        logged += 1
        if url:
            log.info("W&B: %s", url)
    run = cells[0].folder.parent
    if logged < len(cells):
        log.info("W&B: %s unchanged since they were tracked (%s)", counted(len(cells) - logged, "cell"), mode)
    if logged and mode == "offline":
        log.info(
            "W&B (offline): %s/*/wandb; nemo-bench track %s logger.mode=online uploads it, from any machine", run, run
        )


def _log(cell: LoggedCell, settings: LoggerSettings, tracked: Tracked, *, in_sweep: bool) -> str | None:
    results = cell.results
    # A sweep agent has decided these by itself; wandb warns of every one that is given again.
    place = {**tracked.model_dump(include={"project", "entity", "id"}), "resume": "allow"}
    mode: Any = tracked.mode
    with (
        _staged_in(cell.folder / "wandb"),
        wandb.init(
            **({} if in_sweep else place),
            name=results.name[:64],
            group=cell.run.name[:64],
            job_type="benchmark",
            tags=list(dict.fromkeys(name[:64] for name in (results.model, results.method, results.spec.prompts))),
            notes=results.starts[-1].command,
            config=cell.config,
            dir=cell.folder,
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
        run.log({**cell.means, "prompts": _prompts(cell, settings.thumbnails), **_charts(cell)})
        run.summary.update(cell.row)
        run.log_artifact(_artifact(cell))
    return None if run.offline else run.url


def _mode(asked: str | None) -> tuple[Any, str]:
    """The mode that runs are made in, and why; where nobody chose one, online if wandb finds a key for its server.

    TrackingError where runs are to be online without a key; wandb would ask for one in the middle of the run.
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


def _prompts(cell: LoggedCell, thumbnails: int) -> wandb.Table:
    metrics = list(cell.results.summary.metrics)
    table = wandb.Table(columns=["prompt", "text", "group", *PICTURES, "neurons by layer", *metrics])
    for number, prompt in enumerate(cell.results.prompts):
        pictures = cell.pictures(prompt) if number < thumbnails else {}
        table.add_data(
            prompt.id,
            prompt.text,
            prompt.group,
            *(wandb.Image(pictures[name]) if name in pictures else None for name in PICTURES),
            json.dumps(dict(cell.results.outcomes[prompt.id].neurons)),
            *(cell.value(prompt, metric) for metric in metrics),
        )
    return table


def _charts(cell: LoggedCell) -> dict[str, Any]:
    results = cell.results
    title, outcomes = results.spec.title, results.outcomes
    charts: dict[str, Any] = {}
    for name, roc in results.summary.detection.items():
        if roc.curve:
            table = wandb.Table(columns=["class", "fpr", "tpr"], data=[[title, x, y] for x, y in roc.curve])
            axes = {"x-axis-title": "False positive rate", "y-axis-title": "True positive rate"}
            words = {"title": f"ROC: {roc.title}", **axes}
            fields = {"x": "fpr", "y": "tpr", "class": "class"}
            # wandb.plot.roc_curve draws the same, but has scikit-learn compute the points.
            charts[f"detection/roc/{name}"] = wandb.plot_table("wandb/area-under-curve/v0", table, fields, words)
    if cell.tradeoff:
        x, y = cell.tradeoff
        aggregates = results.summary.aggregates.items()
        means = [[title, group, row[x].mean, row[y].mean] for group, row in aggregates if x in row and y in row]
        table = wandb.Table(columns=["method", "group", x, y], data=means)
        charts["tradeoff/groups"] = wandb.plot.scatter(table, x, y, "Trade-off, mean of each group")
        points = [[p.id, p.group, cell.value(p, x), cell.value(p, y)] for p in results.prompts]
        table = wandb.Table(columns=["prompt", "group", x, y], data=[point for point in points if None not in point])
        charts["tradeoff/prompts"] = wandb.plot.scatter(table, x, y, "Trade-off, one point a prompt")
    if any(outcome.neurons for outcome in outcomes.values()):
        counts = [[p.id, p.group, outcomes[p.id].neurons.count] for p in results.prompts]
        table = wandb.Table(columns=["prompt", "group", "neurons"], data=counts)
        charts["neurons/per_prompt"] = wandb.plot.histogram(table, "neurons", "Neurons per prompt")
        table = wandb.Table(columns=["layer", "width", "neurons"], data=cell.neurons_by_layer())
        heading = "Neurons per layer, mean over prompts"
        charts["neurons/per_layer"] = wandb.plot.bar(table, "layer", "neurons", heading)
    return charts


def _artifact(cell: LoggedCell) -> wandb.Artifact:
    """Records and what they belong to; the same results always make the same content, so no new version."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"records-{cell.results.name}")
    artifact = wandb.Artifact(name[:128], type="records", metadata={"cell": cell.results.name})
    names = ("spec.json", "metrics.json", "layers.json", "prompts.jsonl", "neurons.csv")
    files = [cell.folder / name for name in names]
    for file in sorted([*cell.folder.glob("records/[!.]*.jsonl"), *(file for file in files if file.is_file())]):
        artifact.add_file(str(file), file.relative_to(cell.folder).as_posix())
    return artifact
