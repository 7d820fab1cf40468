"""Weights & Biases: one run a cell; nothing else imports wandb."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import wandb
from PIL import Image
from wandb.sdk.lib.wbauth import read_netrc_auth

from nemo_bench.config import LoggerSettings
from nemo_bench.errors import TrackingError, counted
from nemo_bench.records.io import digest, is_whole, read_file, write_json
from nemo_bench.records.schema import Tracked
from nemo_bench.tracking import sweep_trial
from nemo_bench.tracking.logged import PICTURES, BegunCell, LoggedCell, next_step

FLUSH = 5.0
"""Seconds after which a run that is under way is in its file, to be read or to survive a kill."""

log = logging.getLogger(__name__)


def log_wandb(cells: Sequence[LoggedCell], settings: LoggerSettings, again: bool) -> None:
    """Makes or continues the W&B run of every finished cell; see :class:`WandbLog`.

    A cell without a change since it was logged is left alone. TrackingError where W&B failed at a cell, in whatever
    way; the cells after it are not tried.
    """
    trial = sweep_trial({cell.results.name: cell.results.method for cell in cells})
    if trial:
        cells = [cell for cell in cells if cell.results.name == trial]
    logger = WandbLog(settings, trial, is_live=False)
    if logger.mode == "disabled":
        return
    logged = 0
    for cell in cells:
        file = cell.folder / "tracked.json"
        before = read_file(file, Tracked) if file.exists() else None
        tracked = logger.tracked(cell.begun).model_copy(update={"results": cell.digest})
        if before and not again and tracked == before.model_copy(update={"url": None}):
            continue
        try:
            logger.begin(cell.begun)
            logger.finish(cell, next_step(cell.folder))
        except Exception as error:  # wandb and its service raise errors of many kinds
            raise TrackingError(f"{cell.results.name}: {str(error) or type(error).__name__}") from error
        logged += 1
    if logged < len(cells):
        log.info("W&B: %s unchanged since they were tracked (%s)", counted(len(cells) - logged, "cell"), logger.mode)
    if logged:
        logger.close(cells[0].folder.parent)


class WandbLog:
    """One W&B run a cell: config and command, live figures and a sample sheet, then summary, tables, charts, artifact.

    A run's id follows from run and cell, or is that of the sweep agent, whose trial is then the only cell logged. It is
    kept beside the records: a cell that is stopped and resumed stays one run. See
    :class:`nemo_bench.tracking.live.CellLog` for its methods.

    Args:
        settings: Settings of all loggers.
        trial: The only cell that a sweep agent waits for; None without an agent.
        is_live: Whether the figures of this process and its machine belong to the run.

    Raises:
        TrackingError: Runs are to be online, and there is no key.
    """

    def __init__(self, settings: LoggerSettings, trial: str | None = None, *, is_live: bool = True) -> None:
        self.settings = settings
        self.trial = trial
        self.is_live = is_live
        # Reports of wandb's own errors keep a process from ending for half a minute where their server is silent.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.mode, why = mode_of(settings.mode)
        self._run: wandb.Run | None = None
        self._uploads = ""
        log.info("W&B: %s, %s", self.mode, why)

    def tracked(self, cell: BegunCell) -> Tracked:
        """What is kept of a cell's W&B run before its results are logged."""
        file = cell.folder / "tracked.json"
        if self.trial:
            identity = os.environ["WANDB_RUN_ID"]
        elif is_whole(file, Tracked):
            identity = read_file(file, Tracked).id
        else:
            identity = digest([cell.run.token, cell.name])
        settings = self.settings
        return Tracked(id=identity, project=settings.project, entity=settings.entity, mode=self.mode)

    def begin(self, cell: BegunCell) -> None:
        """Makes or continues the run of a cell, with config and command."""
        self._run = None
        if self.mode == "disabled" or self.trial not in (None, cell.name):
            return
        tracked = self.tracked(cell)
        # A sweep agent has decided these by itself; wandb warns of every one that is given again.
        place = {**tracked.model_dump(include={"project", "entity", "id"}), "resume": "allow"}
        names = (cell.spec.model, str(cell.spec.method or cell.spec.detector), cell.spec.prompts)
        self._uploads = f"nemo-bench track {cell.folder.parent} logger.mode=online uploads it, from any machine"
        if cell.spec.task == "detect":
            self._uploads = f"wandb sync {cell.folder.parent}/*/wandb/offline-run-* uploads it"
        with _staged_in(cell.folder / "wandb"):
            self._run = wandb.init(
                **({} if self.trial else place),
                name=cell.name[:64],
                group=cell.run.name[:64],
                job_type="benchmark",
                tags=list(dict.fromkeys(name[:64] for name in names)),
                notes=cell.start.command,
                config=cell.config,
                dir=cell.folder,
                mode=self.mode,
                reinit="create_new",
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    x_disable_stats=not self.is_live,
                    x_transaction_log_flush_interval=FLUSH,
                    init_timeout=self.settings.timeout,
                    finish_timeout=self.settings.timeout,
                    finish_timeout_raises=True,
                ),
            )
        url = None if self._run.offline else self._run.url
        write_json(cell.folder / "tracked.json", tracked.model_copy(update={"url": url}))
        if url:
            log.info("W&B: %s", url)

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Adds a row to the history."""
        if self._run is not None:
            # The server may know of later steps, where those kept beside the records were lost.
            self._run.log({**figures}, step=max(step, self._run.step), commit=True)

    def show(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        """Adds pictures with their captions."""
        self.log({"live/samples": [wandb.Image(picture, caption=name) for name, picture in pictures.items()]}, step)

    def finish(self, cell: LoggedCell, step: int) -> None:
        """Adds everything there is of a finished cell, and ends its run."""
        if self._run is None:
            return
        with _staged_in(cell.folder / "wandb"):
            try:
                self.log({**cell.means, "prompts": _prompts(cell, self.settings.thumbnails), **_charts(cell)}, step)
                self._run.summary.update(cell.row)
                self._run.log_artifact(_artifact(cell))
            except BaseException:  # a run as a context would print a traceback
                with suppress(Exception):
                    self.stop()
                raise
            self._run.finish()
        self._run = None
        file = cell.folder / "tracked.json"
        write_json(file, read_file(file, Tracked).model_copy(update={"results": cell.digest}))

    def conclude(self, row: Mapping[str, float], step: int) -> None:
        """Adds the numbers, which are the summary as well, and ends the run."""
        if self._run is not None:
            self.log(row, step)
            self._run.finish()
            self._run = None

    def stop(self) -> None:
        """Ends the run of a cell that is not finished; it goes on when the cell does."""
        if self._run is not None:
            self._run.finish(exit_code=1)

    def close(self, folder: Path) -> None:
        """Says how runs are uploaded."""
        if self.mode == "offline":
            log.info("W&B (offline): %s/*/wandb; %s", folder, self._uploads)


def mode_of(asked: str | None) -> tuple[Any, str]:
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
