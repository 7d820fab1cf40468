"""The typed form of every file and line in a results folder; the same class writes it and reads it back.

A record is one line of ``records/<stage>.<n>.jsonl``. Fields that have no value are left out of a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemo_bench.errors import counted
from nemo_bench.records.data import Localization, Neurons

VERSION = 1
"""Version of the schema."""

Task = Literal["benchmark", "detect", "external", "calibrate", "features"]
"""What a folder of records belongs to: a mitigation, a detector, images made by other code, or a cached measurement."""


class Entry(BaseModel):
    """A part of a file: immutable, without unknown fields. A float that is not finite is written as null."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    def json_text(self, indent: int | None = None) -> str:
        """The entry as JSON, without the fields that have no value."""
        return self.model_dump_json(exclude_none=True, indent=indent)


class Cost(Entry):
    """What a record took.

    Attributes:
        seconds: Wall-clock time, the batch's share.
        row_passes: UNet forward passes of one sample.
        extra_row_passes: Those of a detector beside sampling.
        once_seconds: Time of what the method does once for a prompt.
        once_row_passes: Passes of what the method does once for a prompt.
        peak_memory_mb: Megabytes: on a GPU the most allocated in the stage, else the largest of the process so far.
        device: Type of the device, such as ``"cuda"``.
    """

    seconds: float | None = None
    row_passes: float | None = None
    extra_row_passes: float | None = None
    once_seconds: float | None = None
    once_row_passes: float | None = None
    peak_memory_mb: int | None = None
    device: str | None = None


class Record(Entry):
    """A line of a stage.

    Attributes:
        stage: Name of the stage.
        result: Field that has a value wherever the record does not say why it failed.
        id: Hash of what the record is of.
        cost: What it took; all that may differ between two runs beside :attr:`sha256` and :attr:`bytes`.
        image: Picture of the record, a path in the cell's folder or an absolute one.
        file: Tensors of the record, a path in the cell's folder.
        sha256: Digest of the picture.
        bytes: Size of the picture.
        failed: Why there is no result: what was not finite.
    """

    stage: ClassVar[str]
    result: ClassVar[str | None] = None
    id: str
    cost: Cost | None = None
    image: str | None = None
    file: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    failed: Any = None


class ChunkRecord(Record):
    """Statistics of a chunk of general prompts, or features of a chunk of real pictures.

    Attributes:
        count: Prompts or pictures of the chunk.
    """

    count: int


class StatisticsRecord(ChunkRecord):
    """Moments of the activations of some general prompts."""

    stage = "statistics"


class FeatureRecord(ChunkRecord):
    """Features of some real pictures."""

    stage = "features"


class PromptRecord(Record):
    """A record of a prompt.

    Attributes:
        prompt: Id of the prompt.
    """

    prompt: str
    failed: str | None = None


class CalibrationRecord(PromptRecord):
    """Similarities of the noise differences of all pairs of seeds of a general prompt, in [-1, 1]."""

    stage = "calibrate"
    result = "pairs"
    pairs: list[float] | None = None


class LocalizationRecord(PromptRecord):
    """The neurons of a prompt; see :class:`nemo_bench.records.data.Localization` for the fields."""

    stage = "localize"
    result = "neurons"
    neurons: dict[str, list[int]] | None = None
    initial: dict[str, list[int]] = {}
    gate_score: float | None = None
    initial_score: float | None = None
    refined_score: float | None = None
    threshold: float | None = None
    passed_gate: bool | None = None
    exhausted: bool | None = None
    listed: dict[str, list[int]] = {}
    listed_initial: dict[str, list[int]] = {}

    @property
    def localization(self) -> Localization:
        """The localization; empty where the prompt failed."""
        return Localization(
            neurons=Neurons(self.neurons),
            initial=Neurons(self.initial),
            gate_score=self.gate_score or 0.0,
            initial_score=self.initial_score or 0.0,
            refined_score=self.refined_score or 0.0,
            threshold=self.threshold or 0.0,
            passed_gate=self.passed_gate,
            exhausted=self.exhausted,
            listed={layer: tuple(ids) for layer, ids in self.listed.items()},
            listed_initial={layer: tuple(ids) for layer, ids in self.listed_initial.items()},
        )


class MemorizationRecord(PromptRecord):
    """The memorization score of a prompt with the method applied; ``image`` is a strip of noise differences.

    Attributes:
        score: Mean similarity of the noise differences of all pairs of seeds, in [-1, 1].
        truncated: Whether the prompt is longer than the text encoder's window.
    """

    stage = "memorization"
    result = "score"
    score: float | None = None
    truncated: bool = False


class ImageRecord(PromptRecord):
    """A generated or external image.

    Attributes:
        seed: Number of the image among those of the prompt, from 0.
        notes: What the method says of the image.
        size: Width and height of an external image.
        written: When an external image was written, in nanoseconds.
    """

    stage = "generate"
    result = "image"
    seed: int
    notes: dict[str, Any] | None = None
    size: tuple[int, int] | None = None
    written: int | None = None


class ScoreRecord(PromptRecord):
    """Scores of an image or of a prompt.

    Attributes:
        seed: Number of the image, None for a prompt.
        scores: By metric.
        truncated: Whether the metric's text encoder cut the prompt, for a prompt whose text was embedded.
        failed: Reasons by metric.
    """

    stage = "score"
    seed: int | None = None
    scores: dict[str, float] = {}
    truncated: bool | None = None
    failed: dict[str, str] | None = None  # type: ignore[assignment] # one reason for each metric


class DetectionRecord(PromptRecord):
    """A detector's score of a prompt, larger for memorized ones.

    Attributes:
        score: The score.
        details: What explains it.
    """

    stage = "detect"
    result = "score"
    score: float | None = None
    details: dict[str, Any] | None = None


class SearchRecord(PromptRecord):
    """A search of an audit; ``image`` is its sheet, a row of pictures for each state.

    Attributes:
        source: Id of the prompt whose picture was searched for.
        states: Rows of the sheet.
    """

    stage = "audit"
    source: str
    states: list[str] = []


class SearchScoreRecord(Record):
    """Scores of a sheet: by state and metric, one value an image.

    Attributes:
        search: Id of the search.
    """

    stage = "audit_scores"
    search: str
    scores: dict[str, dict[str, list[float]]] | None = None


RECORDS: tuple[type[Record], ...] = (
    StatisticsRecord,
    CalibrationRecord,
    LocalizationRecord,
    MemorizationRecord,
    ImageRecord,
    FeatureRecord,
    ScoreRecord,
    DetectionRecord,
    SearchRecord,
    SearchScoreRecord,
)
"""Records of all stages, in the order of the stages."""


class Spec(Entry):
    """What a cell is: ``spec.json``.

    Attributes:
        version: Of the schema.
        task: What the folder belongs to.
        stages: Names of the stages that it goes through.
        cell: Name of the folder.
        model: Name of the model.
        method: Name of the mitigation.
        detector: Name of the detector.
        prompts: Name of the prompt list.
        title: Name of method or detector for people.
        settings: Identity settings: everything that changes the result, and nothing else; the folder is named by them.
        families: Which settings were chosen for the model's family.
        digests: Of weights, prompts and images; the commit of a model from the hub.
        citations: BibTeX by title.
        calibration: Path to the calibration's folder from the cell's.
        general_prompts: ``file`` and ``digest`` of the prompts that the calibration takes.
    """

    version: int = Field(default=VERSION, alias="schema")
    task: Task
    stages: list[str] = []
    cell: str = ""
    model: str = ""
    method: str | None = None
    detector: str | None = None
    prompts: str = ""
    title: str = ""
    settings: dict[str, Any]
    families: list[str] = []
    digests: dict[str, str] = {}
    citations: dict[str, str] = {}
    calibration: str | None = None
    general_prompts: dict[str, str] | None = None


class Start(Entry):
    """A start of a cell.

    Attributes:
        time: ISO 8601, UTC.
        command: What the user typed.
        commit: Commit of the package's checkout, if it runs from one.
        dirty: Whether that checkout had changes.
        world_size: Processes.
        device: Name of the device.
        python: Version.
        settings: All settings.
        versions: Of packages, by name.
    """

    time: str
    command: str
    commit: str | None = None
    dirty: bool | None = None
    world_size: int = 1
    device: str
    python: str = ""
    settings: dict[str, Any] = {}
    versions: dict[str, str]


class Environment(Entry):
    """Every start of a cell, the latest last: ``env.json``."""

    starts: list[Start] = Field(min_length=1)


class Run(Entry):
    """The cells of a run in the order asked for: ``run.json``.

    Attributes:
        token: Tells the run from others of its name.
    """

    version: int = Field(default=VERSION, alias="schema")
    name: str
    token: str
    cells: list[str]


class Scoring(Entry):
    """What decides the scores of given images: ``scoring.json``.

    Attributes:
        metrics: Settings of every metric, its files replaced by their digests.
        unmitigated: The cell that images are compared with.
        references: Digest of the training images.
    """

    metrics: dict[str, Any]
    unmitigated: str | None = None
    references: str


class Gate(Entry):
    """A threshold on similarities of noise differences.

    Attributes:
        threshold: Mean plus one standard deviation; None where most general prompts failed.
        mean: Of the similarities.
        std: Of the similarities.
        passed_gate: General prompts with a pair above the threshold.
    """

    threshold: float | None = None
    mean: float | None = None
    std: float | None = None
    passed_gate: int | None = None


class Threshold(Gate):
    """The memorization threshold of a model: ``threshold.json``.

    Attributes:
        prompts: General prompts that it comes from.
        failed: General prompts whose noise differences were not finite.
        maxima: The same for the most alike pair of each prompt.
        protocol: How noise differences were taken.
        similarity: How they were compared.
        velocity: What of a velocity prediction was compared.
    """

    prompts: int = 0
    failed: int = 0
    maxima: Gate = Gate()
    protocol: str
    similarity: str
    velocity: str


class MetricInfo(Entry):
    """What a metric measures; see :class:`nemo_bench.metrics.BenchMetric` for the fields.

    Attributes:
        measure: Name of its class.
        role: What it stands for in other papers' aggregates.
    """

    measure: str = ""
    role: str = ""
    title: str
    description: str = ""
    citation: str = ""
    higher_is_better: bool | None = None
    lower: float | None = None
    upper: float | None = None
    family: str = ""
    per: Literal["image", "prompt", "set"] = "image"

    @property
    def arrow(self) -> str:
        """``↑`` where larger is better, ``↓`` where smaller is better, else nothing."""
        return "" if self.higher_is_better is None else "↑" if self.higher_is_better else "↓"


class Paired(Entry):
    """Mean over prompts of a difference, its 95% bootstrap interval, and p of a two-sided sign-flip test.

    Attributes:
        p_holm: The same, corrected over all cells of a leaderboard.
    """

    difference: float
    low: float
    high: float
    p: float
    prompts: int
    p_holm: float | None = None


class Aggregate(Entry):
    """A metric over a group of prompts: mean with its 95% bootstrap interval, median and median absolute deviation.

    A metric of a whole set has a mean alone.

    Attributes:
        paired: The difference to no mitigation, where the same prompts were run without.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    median: float | None = None
    mad: float | None = None
    prompts: int
    paired: Paired | None = None


class Statistic(Entry):
    """A number of a preset with its 95% bootstrap interval and, for a median, the median absolute deviation."""

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    prompts: int


class Preset(Entry):
    """Numbers aggregated as another paper does: by group, then by metric."""

    title: str
    definition: str
    citation: str
    rows: dict[str, dict[str, Statistic]]


class Roc(Entry):
    """How well scores tell memorized prompts from others; see :func:`nemo_bench.metrics.roc.detection`.

    Attributes:
        title: Name of the score.
        kinds: Area under the curve by kind of memorized prompts.
        failed: Prompts without a finite score.
    """

    title: str
    auc: float
    auc_low: float | None = None
    auc_high: float | None = None
    average_precision: float
    tpr_at_1_fpr_below: float
    tpr_at_1_fpr_nearest: float
    tpr_at_1_fpr_first: float
    best_accuracy: float
    memorized: int
    other: int
    curve: list[list[float]] = []
    kinds: dict[str, float] = {}
    failed: int = 0


class Failures(Entry):
    """What was not finite in a group of prompts.

    Attributes:
        images: Number of images.
        localizations: Number of prompts whose neurons or noise differences were not finite.
        scores: Number of scores of images and prompts.
        metrics: By metric, how many images and prompts it lacks for any of these reasons.
    """

    images: int = 0
    localizations: int = 0
    scores: int = 0
    metrics: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Images, localizations and scores together."""
        return self.images + self.localizations + self.scores

    def __str__(self) -> str:
        """Such as ``3 images, 1 localization``; empty where nothing failed."""
        counts = {"image": self.images, "localization": self.localizations, "score": self.scores}
        return ", ".join(counted(count, name) for name, count in counts.items() if count)


class Summary(Entry):
    """The numbers of a cell: ``metrics.json``.

    Attributes:
        unmitigated: The cell of the same images without mitigation.
        metrics: What each metric measures.
        aggregates: By group and metric.
        presets: The same scores as other papers aggregate them.
        failed: By group in which anything was not finite.
        detection: By detector, where prompts of both sorts were run.
        localization: By group, where neurons were searched: number of ``prompts``, ``passed_gate``, and in how many the
            selection was ``exhausted``.
        counts: Images, prompts, and what is missing.
        cost: Mean seconds and UNet passes, peak memory in MB.
        peak_memory_of: Whether the peak is that of the process or of the GPU.
    """

    unmitigated: str | None = None
    metrics: dict[str, MetricInfo] = {}
    aggregates: dict[str, dict[str, Aggregate]] = {}
    presets: dict[str, Preset] = {}
    failed: dict[str, Failures] = {}
    detection: dict[str, Roc] = {}
    localization: dict[str, dict[str, int | None]] = {}
    counts: dict[str, int]
    cost: dict[str, float] = {}
    peak_memory_of: Literal["process", "GPU"] = "process"


class SearchGroup(Entry):
    """Searches of an audit for memorized prompts, or for controls.

    Attributes:
        prompts: Number of different prompts.
        scores: By metric and state: ``mean``, ``low`` and ``high``, its 95% interval over prompts.
    """

    prompts: int
    scores: dict[str, dict[str, dict[str, float]]]


class SearchResult(Entry):
    """A search that the report shows.

    Attributes:
        prompt: Id of the prompt whose neurons are blocked.
        source: Id of the prompt whose picture was searched for.
        text: That prompt.
        group: ``"memorized"`` or ``"control"``.
        sheet: Path of its pictures.
        scores: Mean over images by state and metric.
    """

    prompt: str
    source: str
    text: str
    group: Literal["memorized", "control"]
    sheet: str
    scores: dict[str, dict[str, float]]


class Audit(Entry):
    """An audit of a cell.

    Attributes:
        id: Hash of its searches.
        settings: How it searched.
        states: What images are generated from, by state.
        metrics: What each metric measures.
        groups: ``memorized`` and ``control``, where any search of them succeeded.
        failed: Failed searches by group.
        compared: By metric, memorized minus control with the embedding that the search ended with.
        verdict: By memorization rate; see :func:`nemo_bench.benchmark.audit.verdict`.
        searches: One entry a search.
        cost: Mean UNet passes and seconds of a search.
        command: What the user typed.
    """

    id: str
    settings: dict[str, Any]
    states: dict[str, str]
    metrics: dict[str, MetricInfo]
    groups: dict[str, SearchGroup]
    failed: dict[str, int]
    compared: dict[str, Paired]
    verdict: dict[str, str]
    searches: list[SearchResult]
    cost: dict[str, float]
    command: str = ""


class Audits(Entry):
    """All audits of a cell: ``audit.json``."""

    audits: list[Audit]


class LeaderboardRow(Entry):
    """A cell and a group of prompts.

    Attributes:
        prompts: Name of the prompt list.
        n_prompts: Prompts of the group.
        metrics: Aggregates by metric, p corrected over the rows of the group.
        best: Metrics in which no cell of the model is better, with p of the difference to the runner-up.
    """

    cell: str
    label: str
    model: str
    method: str
    prompts: str
    group: str
    n_prompts: int
    passed_gate: int | None = None
    exhausted: int | None = None
    metrics: dict[str, Aggregate]
    failed: Failures
    best: dict[str, float]
    cost: dict[str, float]
    counts: dict[str, int]


class Leaderboard(Entry):
    """The table of a run: ``leaderboard.json``.

    Attributes:
        unfinished: Every other cell, and what is missing there.
    """

    version: int = Field(default=VERSION, alias="schema")
    name: str
    metrics: dict[str, MetricInfo]
    rows: list[LeaderboardRow]
    unfinished: dict[str, str]


class DetectionRow(Entry):
    """A detector on a model and a prompt list.

    Attributes:
        prompts: Number of prompts.
        label: Title, and the settings by which it differs from others of this title.
        failed: Prompts without a finite score.
        seeds: Seeds a prompt.
        cost: Mean UNet passes and seconds of a prompt.
        settings: Of the detector.
        model_settings: Of the model.
    """

    cell: str
    model: str
    detector: str
    prompts: int
    label: str
    title: str
    failed: int
    seeds: int
    cost: dict[str, float]
    settings: dict[str, Any]
    model_settings: dict[str, Any]


class MeasuredDetectionRow(DetectionRow, Roc):
    """A detector that scored both memorized and other prompts, with its measures."""


class DetectionTable(Entry):
    """The detectors of a run: ``detection.json``."""

    version: int = Field(default=VERSION, alias="schema")
    name: str
    detectors: list[MeasuredDetectionRow | DetectionRow]


class Thumbnail(Entry):
    """A small picture.

    Attributes:
        uri: WebP as a data URI.
        width: In pixels.
        height: In pixels.
        tiny: The image was not made smaller, so its pixels may be shown as squares.
    """

    uri: str
    width: int
    height: int
    tiny: bool


class ThumbnailCache(Entry):
    """Small pictures of a cell by name, size, time and box of their image: ``thumbnails.json``."""

    thumbnails: dict[str, Thumbnail]


class Tracked(Entry):
    """The last W&B run of a cell: ``tracked.json``.

    Attributes:
        id: Of the W&B run.
        results: Hash of the logged results.
        url: Of the W&B run, unless it is offline.
    """

    id: str
    project: str
    entity: str | None = None
    mode: str
    results: str
    url: str | None = None


_RUN = "the command of the run writes it again, and computes nothing twice"
_SCORE = "nemo-bench score, with its folder, writes it again"
_REPORT = "nemo-bench report writes it again"
FILES: Mapping[str, tuple[type[Entry] | None, str]] = {
    "run.json": (Run, "the command of the run writes it again, with all cells that are in the folder"),
    "spec.json": (Spec, _RUN),
    "env.json": (Environment, _RUN),
    "prompts.jsonl": (None, _RUN),
    "layers.json": (None, _RUN),
    "scoring.json": (Scoring, _SCORE),
    "sets.json": (None, _SCORE),
    "metrics.json": (Summary, f"{_SCORE}; that of a detector, nemo-bench detect"),
    "audit.json": (Audits, "the commands of the audits write it again, and compute nothing twice"),
    "threshold.json": (Threshold, "the next run that needs it writes it again from its records"),
    "leaderboard.json": (Leaderboard, _REPORT),
    "detection.json": (DetectionTable, _REPORT),
    "thumbnails.json": (ThumbnailCache, _REPORT),
    "tracked.json": (Tracked, "nemo-bench track writes it again"),
}
"""The class of every file, and what writes a file again that was deleted."""
