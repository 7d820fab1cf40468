"""The typed form of every file and line in a results folder; the same class writes it and reads it back.

A record is one line of ``records/<stage>.<n>.jsonl``. Fields that have no value are left out of a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemo_bench.errors import counted
from nemo_bench.records.data import Axis, Localization

VERSION = 1
"""Version of the schema: of the names, types and meanings of what is in files and lines."""
UPGRADES: Mapping[int, Callable[[str, Any], Any]] = {}
"""By every older version, the function that makes content of the next version of it.

It is given the name of a file, or the stage of a record, and any JSON, and returns what is to stand there. What has the
newer form already, or is damaged, it returns as it is: a kill may leave a folder that was brought to the newer form in
part. Settings in a :class:`Spec` and ids of records are no form; results that depend on others are other results.
"""


def upgraded(name: str, content: Any, version: int) -> Any:
    """JSON of an older version in the form of this one; see :data:`UPGRADES`."""
    for older in range(version, VERSION):
        content = UPGRADES[older](name, content)
    return {**content, "schema": VERSION} if isinstance(content, dict) and "schema" in content else content


Task = Literal["benchmark", "detect", "external", "calibrate", "features", "fit"]
"""What a folder of records belongs to: a mitigation, a detector, images made by other code, or a cached measurement."""


class Entry(BaseModel):
    """A part of a file: immutable, without unknown fields. A float that is not finite is written as null."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)


class Versioned(Entry):
    """A file that states the version of the schema; that of a cell's ``spec.json`` holds for all else in its folder."""

    version: int = Field(default_factory=lambda: VERSION, ge=1, alias="schema")  #: Of the schema.


class Cost(Entry):
    """What a record took."""

    seconds: float | None = None  #: Wall-clock time, the batch's share.
    row_passes: float | None = None  #: UNet forward passes of one sample.
    extra_row_passes: float | None = None  #: Those of a detector beside sampling.
    once_seconds: float | None = None  #: Time of what the method does once for a prompt.
    once_row_passes: float | None = None  #: Passes of what the method does once for a prompt.
    #: Megabytes: on a GPU the most allocated in the stage, else the largest of the process so far.
    peak_memory_mb: int | None = None
    device: str | None = None  #: Type of the device, such as ``"cuda"``.


class Record(Entry):
    """A line of a stage."""

    stage: ClassVar[str] = ""  #: Name of the stage.
    result: ClassVar[str | None] = None  #: Field that has a value wherever the record does not say why it failed.
    id: str  #: Hash of what the record is of.
    #: What it took; all that may differ between two runs beside :attr:`sha256` and :attr:`bytes`.
    cost: Cost | None = None
    image: str | None = None  #: Picture of the record, a path in the cell's folder or an absolute one.
    file: str | None = None  #: Tensors of the record, a path in the cell's folder.
    sha256: str | None = None  #: Digest of the picture.
    bytes: int | None = None  #: Size of the picture.
    failed: Any = None  #: Why there is no result: what was not finite.


class ChunkRecord(Record):
    """Moments of the activations of some general prompts, or features of some real pictures."""

    stage = "chunk"
    count: int  #: Prompts or pictures of the chunk.


class PromptRecord(Record):
    """A record of a prompt."""

    prompt: str  #: Id of the prompt.
    failed: str | None = None


class CalibrationRecord(PromptRecord):
    """Similarities of the noise differences of all pairs of seeds of a general prompt, in [-1, 1]."""

    stage = "calibrate"
    result = "pairs"
    pairs: list[float] | None = None


class LocalizationRecord(PromptRecord):
    """The neurons of a prompt; ``file`` holds the scores of all neurons, where there are any."""

    stage = "localize"
    result = "localization"
    localization: Localization | None = None  #: Neurons and how they were found.


class MemorizationRecord(PromptRecord):
    """The memorization score of a prompt with the method applied; ``image`` is a strip of noise differences."""

    stage = "memorization"
    result = "score"
    score: float | None = None  #: Mean similarity of the noise differences of all pairs of seeds, in [-1, 1].
    loss: float | None = None  #: Training loss of its pictures with the method applied, where that is asked for.
    truncated: bool = False  #: Whether the prompt is longer than the text encoder's window.


class ImageRecord(PromptRecord):
    """A generated or external image."""

    stage = "generate"
    result = "image"
    seed: int  #: Number of the image among those of the prompt, from 0.
    notes: dict[str, Any] | None = None  #: What the method says of the image.
    size: tuple[int, int] | None = None  #: Width and height of an external image.
    written: int | None = None  #: When an external image was written, in nanoseconds.


class ScoreRecord(PromptRecord):
    """Scores of an image or of a prompt."""

    stage = "score"
    seed: int | None = None  #: Number of the image, None for a prompt.
    scores: dict[str, float] = {}  #: By metric.
    #: Whether the metric's text encoder cut the prompt, for a prompt whose text was embedded.
    truncated: bool | None = None
    #: Of a prompt without mitigation, by metric of alignment: mean over its images of their score with the text of
    #: another prompt.
    shuffled: dict[str, float] | None = None
    #: Reasons by metric.
    failed: dict[str, str] | None = None  # type: ignore[assignment] # one reason for each metric


class DetectionRecord(PromptRecord):
    """A detector's score of a prompt, larger for memorized ones."""

    stage = "detect"
    result = "score"
    score: float | None = None  #: The score.
    details: dict[str, Any] | None = None  #: What explains it.


class Inversion(Entry):
    """How an inversion ended."""

    divergence: float  #: Of the noise from a standard normal one: the smaller, the more memorized.
    reached: bool  #: Whether the picture was replicated; where it was not, the divergence says nothing.
    steps: int  #: Steps that it took.
    guidance: float  #: Guidance at which most images of the last check replicate the picture.


class Spread(Entry):
    """Euclidean distances of all pairs of embeddings: mean, quartiles, and mean cosine."""

    embeddings: int
    mean: float
    low: float
    median: float
    high: float
    cosine: float


class Agreement(Entry):
    """How far sets of chosen weights of a layer agree, over all pairs."""

    iou: float  #: Mean intersection over union; 1 for two empty sets.
    random: float  #: What it is for random sets of their size.
    share: float  #: Mean share of the weights that is chosen.
    empty: int  #: Pairs of empty sets.


class Diagnosis(Entry):
    """What many searches for one picture ended with, see :func:`nemo_bench.benchmark.diagnostics.diagnose`."""

    spread: dict[str, Spread]  #: Of ``found``, ``starts`` and ``general`` prompts.
    #: By module, mean distance of activations divided by their mean norm: of ``found``, and of ``memorized`` prompts.
    activations: dict[str, dict[str, float]]
    agreement: dict[str, Agreement]  #: By feed-forward layer.


class SearchRecord(PromptRecord):
    """A search of an audit; ``image`` is its sheet, a row of pictures for each state."""

    stage = "audit"
    source: str  #: Id of the prompt whose picture was searched for.
    states: list[str] = []  #: Rows of the sheet.
    inversion: Inversion | None = None  #: Where it was an inversion.
    diagnosis: Diagnosis | None = None  #: Of the searches from random starts for the same picture, where there are any.


class SearchScoreRecord(Record):
    """Scores of a sheet: by state and metric, one value an image."""

    stage = "audit_scores"
    search: str  #: Id of the search.
    scores: dict[str, dict[str, list[float]]] | None = None


RECORDS: tuple[type[Record], ...] = (
    ChunkRecord,
    CalibrationRecord,
    LocalizationRecord,
    MemorizationRecord,
    ImageRecord,
    ScoreRecord,
    DetectionRecord,
    SearchRecord,
    SearchScoreRecord,
)
"""Records of all stages, in the order of the stages."""


class Spec(Versioned):
    """What a cell is: ``spec.json``."""

    task: Task  #: What the folder belongs to.
    stages: list[str] = []  #: Names of its stages, in their order.
    cell: str = ""  #: Name of the folder.
    model: str = ""  #: Name of the model.
    method: str | None = None  #: Name of the mitigation.
    detector: str | None = None  #: Name of the detector.
    prompts: str = ""  #: Name of the prompt list.
    title: str = ""  #: Name of method or detector for people.
    #: Identity settings: everything that changes the result, and nothing else; the folder is named by them.
    settings: dict[str, Any]
    families: list[str] = []  #: Which settings were chosen for the model's family.
    measures: str = ""  #: How memorization is measured, where that is not as published for UNets.
    digests: dict[str, str] = {}  #: Of weights, prompts and images; the commit of a model from the hub.
    citations: dict[str, str] = {}  #: BibTeX by title.
    training: dict[str, Any] | None = None  #: Recipe of the training by ``nemo-bench train`` that made the model.
    source: str | None = None  #: Name of the folder beside it of the cell whose neurons it starts from.
    calibration: str | None = None  #: Path to the calibration's folder from the cell's.
    fitted: str | None = None  #: Path to the folder of fitted weights from the cell's.
    general_prompts: dict[str, str] | None = None  #: ``file`` and ``digest`` of the prompts that the calibration takes.


class Start(Entry):
    """A start of a cell; ``env.json`` lists them, the latest last."""

    time: str  #: ISO 8601, UTC.
    command: str  #: What the user typed.
    commit: str | None = None  #: Commit of the package's checkout, if it runs from one.
    dirty: bool | None = None  #: Whether that checkout had changes.
    world_size: int = 1  #: Processes.
    device: str  #: Name of the device.
    python: str = ""  #: Version.
    settings: dict[str, Any] = {}  #: All settings.
    versions: dict[str, str]  #: Of packages, by name.


class Strength(Entry):
    """What makes a method milder or stronger."""

    setting: str  #: One setting of the method.
    values: list[Any]  #: Its values, from mild to strong.


class Run(Versioned):
    """The cells of a run in the order asked for: ``run.json``."""

    name: str
    token: str  #: Tells the run from others of its name.
    cells: list[str]
    strengths: dict[str, Strength] = {}  #: By cell of a method that was run at several strengths.


class Progress(Entry):
    """How far a stage is, over all processes of a run."""

    stage: str
    label: str  #: Method or model.
    done: int  #: Records done, those of before this run included.
    total: int
    seconds: float  #: Since the stage began in this run.
    computed: int  #: Records computed in this run.
    failed: int = 0  #: Of those computed by the first process, the ones that failed.
    row_passes: float = 0.0  #: UNet passes of a row, of records computed by the first process.

    @property
    def rate(self) -> float:
        """Records a second."""
        return self.computed / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> float | None:
        """Seconds left; None before the first record."""
        return (self.total - self.done) / self.rate if self.rate else None


class Lease(Entry):
    """Who works on a cell: ``.lease.<n>.json``, there only as long as somebody does."""

    host: str
    pid: int
    process: str  #: The process, as no other that had or will have its id is named.
    place: str  #: Boot of a machine and container, in which process ids mean the same.
    since: str  #: ISO 8601, UTC.
    beat: int = 0  #: Counts signs of life.
    progress: Progress | None = None


class Failure(Entry):
    """Why a cell was given up the last time: ``failure.json``."""

    time: str  #: ISO 8601, UTC.
    host: str
    pid: int
    error: str
    log: str  #: File with the traceback, beside the cell's folder.


class Scoring(Entry):
    """What decides the scores of given images: ``scoring.json``."""

    metrics: dict[str, Any]  #: Settings of every metric, its files replaced by their digests.
    unmitigated: str | None = None  #: The cell that images are compared with.
    references: str  #: Digest of the training images.
    truth: str | None = None  #: Digest of the neurons that are known to be the prompts'.


class Gate(Entry):
    """A threshold on similarities of noise differences."""

    threshold: float | None = None  #: Mean plus one standard deviation; None where most general prompts failed.
    mean: float | None = None  #: Of the similarities.
    std: float | None = None  #: Of the similarities.
    passed_gate: int | None = None  #: General prompts with a pair above the threshold.


class Threshold(Gate):
    """The memorization threshold of a model: ``threshold.json``."""

    prompts: int = 0  #: General prompts that it comes from.
    failed: int = 0  #: General prompts whose noise differences were not finite.
    maxima: Gate = Gate()  #: The same for the most alike pair of each prompt.
    protocol: str  #: How noise differences were taken.
    similarity: str  #: How they were compared.
    velocity: str  #: What of a velocity prediction was compared.


class MetricInfo(Entry):
    """What a metric measures; see :class:`nemo_bench.metrics.BenchMetric` for the fields."""

    measure: str = ""  #: Name of its class.
    role: str = ""  #: What it stands for in other papers' aggregates.
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
    """Mean over prompts of a difference, its 95% bootstrap interval, and p of a two-sided sign-flip test."""

    difference: float
    low: float
    high: float
    p: float
    prompts: int
    p_holm: float | None = None  #: The same, corrected over all cells of a leaderboard.


class Aggregate(Entry):
    """A metric over a group of prompts: mean with its 95% bootstrap interval, median and median absolute deviation.

    A metric of a whole set has a mean alone.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    median: float | None = None
    mad: float | None = None
    prompts: int
    paired: Paired | None = None  #: The difference to no mitigation, where the same prompts were run without.


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
    """How well scores tell memorized prompts from others; see :func:`nemo_bench.metrics.roc.detection`."""

    title: str  #: Name of the score.
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
    kinds: dict[str, float] = {}  #: Area under the curve by kind of memorized prompts.
    failed: int = 0  #: Prompts without a finite score.


class Failures(Entry):
    """What was not finite in a group of prompts."""

    images: int = 0  #: Number of images.
    localizations: int = 0  #: Number of prompts whose neurons or noise differences were not finite.
    scores: int = 0  #: Number of scores of images and prompts.
    metrics: dict[str, int] = {}  #: By metric, how many images and prompts it lacks for any of these reasons.

    @property
    def total(self) -> int:
        """Images, localizations and scores together."""
        return self.images + self.localizations + self.scores

    def __str__(self) -> str:
        """Such as ``3 images, 1 localization``; empty where nothing failed."""
        counts = {"image": self.images, "localization": self.localizations, "score": self.scores}
        return ", ".join(counted(count, name) for name, count in counts.items() if count)


class Summary(Entry):
    """The numbers of a cell: ``metrics.json``."""

    unmitigated: str | None = None  #: The cell of the same images without mitigation.
    metrics: dict[str, MetricInfo] = {}  #: What each metric measures.
    aggregates: dict[str, dict[str, Aggregate]] = {}  #: By group and metric.
    presets: dict[str, Preset] = {}  #: The same scores as other papers aggregate them.
    failed: dict[str, Failures] = {}  #: By group in which anything was not finite.
    detection: dict[str, Roc] = {}  #: By detector, where prompts of both sorts were run.
    #: By group, where neurons were searched: number of ``prompts``, ``passed_gate``, and in how many the selection was
    #: ``exhausted``.
    localization: dict[str, dict[str, int | None]] = {}
    counts: dict[str, int]  #: Images, prompts, and what is missing.
    cost: dict[str, float] = {}  #: Mean seconds, passes and teraflops of the network, peak memory in MB.
    peak_memory_of: Literal["process", "GPU"] = "process"  #: Whether the peak is that of the process or of the GPU.


class SearchResult(Entry):
    """A search that the report shows."""

    prompt: str  #: Id of the prompt whose neurons are blocked.
    source: str  #: Id of the prompt whose picture was searched for.
    text: str  #: That prompt.
    group: Literal["memorized", "control"]  #: ``"memorized"`` or ``"control"``.
    sheet: str  #: Path of its pictures.
    scores: dict[str, dict[str, float]]  #: Mean over images by state and metric.
    diagnosis: Diagnosis | None = None  #: Of the searches from random starts for the same picture, where there are any.
    inversion: Inversion | None = None  #: Where it was an inversion.


class Inverted(Entry):
    """Inversions of a group of pictures."""

    pictures: int  #: Number of inversions.
    reached: int  #: In how many the picture was replicated.
    median: float | None = (
        None  #: Of the divergence over all, where those that were not reached are infinite; None for that.
    )


class Audit(Entry):
    """An audit of a cell; ``audit.json`` lists them."""

    id: str  #: Hash of its searches.
    settings: dict[str, Any]  #: How it searched.
    states: dict[str, str]  #: What images are generated from, by state.
    metrics: dict[str, MetricInfo]  #: What each metric measures.
    groups: dict[str, int]  #: Number of different prompts, ``memorized`` and ``control``, where any search succeeded.
    #: By group, metric and state: ``mean``, ``low`` and ``high``, its 95% interval over prompts.
    scores: dict[str, dict[str, dict[str, dict[str, float]]]]
    failed: dict[str, int]  #: Failed searches by group.
    compared: dict[str, Paired]  #: By metric, memorized minus control with the embedding that the search ended with.
    verdict: dict[str, str]  #: By memorization rate; see :func:`nemo_bench.benchmark.audit.verdict`.
    searches: list[SearchResult]  #: One entry a search.
    cost: dict[str, float]  #: Mean UNet passes and seconds of a search.
    inverted: dict[str, Inverted] = {}  #: By group, where pictures were inverted.
    #: Area under the ROC curve of memorized pictures against controls by divergence, infinite where it was not reached.
    inverted_auc: float | None = None
    command: str = ""  #: What the user typed.


LEVELS = (0.05, 0.01, 0.001)
"""Levels of significance, one star each."""


class Collateral(Entry):
    """What an edit for memorized prompts costs other prompts: change of their alignment against no mitigation."""

    one: float | None = None  #: With the neurons of one memorized prompt off, for each prompt those of another one.
    all: float | None = None  #: With the neurons of all memorized prompts off.

    def __str__(self) -> str:
        return " / ".join("–" if value is None else f"{value:+.3f}".replace("-", "−") for value in (self.one, self.all))


class LeaderboardRow(Entry):
    """A cell and a group of prompts."""

    cell: str
    label: str
    model: str
    method: str
    prompts: str  #: Name of the prompt list.
    group: str
    n_prompts: int  #: Prompts of the group.
    passed_gate: int | None = None
    exhausted: int | None = None
    metrics: dict[str, Aggregate]  #: Aggregates by metric, p corrected over the rows of the group.
    failed: Failures
    #: Metrics in which the mean is the best among the cells of the same model, prompts and group, with p of the paired
    #: test against the runner-up: 1 where there is nothing to pair.
    best: dict[str, float]
    cost: dict[str, float]
    counts: dict[str, int]
    #: Of a method that finds neurons, in the rows of prompts that are not memorized, as far as the run has the cells.
    collateral: Collateral | None = None

    @property
    def searches(self) -> str:
        """How searches for neurons ended: ``11 of 16 passed the gate, 11 ran out``; empty without any."""
        if self.passed_gate is None:
            return ""
        words = f"{self.passed_gate} of {self.n_prompts} passed the gate"
        return words if self.exhausted is None else f"{words}, {self.exhausted} ran out"

    @property
    def is_tested(self) -> bool:
        """Whether any metric is compared with no mitigation."""
        return any(value.paired for value in self.metrics.values())

    def is_clear(self, metric: str) -> bool:
        """Whether the cell is the best in a metric, and differs from the runner-up."""
        return self.best.get(metric, 1.0) < LEVELS[0]

    def stars(self, metric: str) -> str:
        """One star for each of :data:`LEVELS` above the corrected p of a metric.

        None where images or scores failed: the others may differ because of what is missing.
        """
        change = self.metrics[metric].paired if metric in self.metrics else None
        if change is None or change.p_holm is None or self.failed.metrics.get(metric):
            return ""
        return "*" * sum(change.p_holm < level for level in LEVELS)


class StrengthPoint(Entry):
    """A method at one strength. Numbers are over memorized prompts, absent where an image or a score failed."""

    cell: str
    value: Any = None  #: Of the setting that makes it milder or stronger.
    choosing_memorized: float | None = None  #: Memorized share of the prompts to choose by.
    choosing_alignment: float | None = None  #: Alignment of the same.
    memorized: Aggregate | None = None  #: Memorized share of the prompts that are reported.
    alignment: Aggregate | None = None  #: Alignment of the same.
    #: By the latter two, each on a scale from 0 to 1: the part of the memorized share that is gone, times the part of
    #: alignment that is left. 0 with nothing gained, 1 with nothing memorized and nothing lost.
    score: float | None = None
    is_on_front: bool  #: Whether no cell of the model and prompts betters both of memorized share and alignment.


class StrengthCurve(Entry):
    """A method from mild to strong; one point where it has no strengths."""

    label: str  #: Title, and the settings by which it differs from others of this title.
    model: str
    method: str
    prompts: str  #: Name of the prompt list.
    setting: str | None = None  #: What makes it milder or stronger.
    points: list[StrengthPoint]
    score: float | None = None  #: That of the chosen setting.
    #: Part of the unit square of memorized share and lost alignment that the points better, of one point its score.
    area: float | None = None
    chosen: str | None = None  #: Its cell with the chosen setting; None for no mitigation.
    is_within: bool  #: Whether the memorized share of that is within the limit, on the prompts to choose by.
    choosing_prompts: int  #: Prompts to choose by.
    prompts_reported: int  #: The other prompts.


class Strengths(Entry):
    """Methods at several strengths, and the setting that is chosen of each."""

    memorized: str  #: Metric of the memorized share.
    alignment: str  #: Metric of alignment.
    #: By model, then by list of prompts: alignment of images without mitigation with the text of other prompts, where
    #: no alignment is left. Without it there are no scores.
    least_alignment: dict[str, dict[str, float]] = {}
    limit: float  #: Largest memorized share of a setting that is chosen for its alignment.
    share: float  #: Expected share of prompts to choose by, told from the others by a hash of their id.
    curves: list[StrengthCurve]


class AxisValue(Entry):
    """A metric over variants of prompts; a prompt counts once, with the mean over its variants."""

    variant: Aggregate  #: Of the variants.
    original: Aggregate | None = None  #: Of the prompts that they vary; None for neighbours.
    before: Aggregate | None = None  #: Of the variants without mitigation, where these were run.
    gap: Paired | None = None  #: Variants minus the prompts that they vary, p corrected over the rows of the axis.
    change: Paired | None = None  #: Variants minus the same without mitigation, likewise.


class AxisRow(Entry):
    """A cell and the variants of prompts along an axis."""

    cell: str
    label: str
    axis: Axis
    originals: int  #: Prompts that are varied.
    variants: int
    values: dict[str, AxisValue]  #: By metric.


class Leaderboard(Versioned):
    """The table of a run: ``leaderboard.json``."""

    name: str
    metrics: dict[str, MetricInfo]
    rows: list[LeaderboardRow]
    unfinished: dict[str, str]  #: Every other cell, and what is missing there.
    strengths: Strengths | None = None  #: Of a run with ``strengths=true``.
    axes: list[AxisRow] = []  #: Of a run with variants of prompts.


class DetectionRow(Entry):
    """A detector on a model and a prompt list."""

    cell: str
    model: str
    detector: str
    prompts: int  #: Number of prompts.
    label: str  #: Title, and the settings by which it differs from others of this title.
    title: str
    failed: int  #: Prompts without a finite score.
    seeds: int  #: Seeds a prompt.
    cost: dict[str, float]  #: Mean UNet passes and seconds of a prompt.
    settings: dict[str, Any]  #: Of the detector.
    model_settings: dict[str, Any]  #: Of the model.
    roc: Roc | None = None  #: Where both memorized and other prompts were scored.


class DetectionTable(Versioned):
    """The detectors of a run: ``detection.json``."""

    name: str
    detectors: list[DetectionRow]


class LocalizerRow(Entry):
    """A localizer and a group of memorized prompts; or these prompts with nothing switched off."""

    cell: str
    label: str  #: Title, and the settings by which it differs from others of this title.
    model: str
    localizer: str  #: Its name, ``none`` for nothing switched off.
    prompts: str  #: Name of the prompt list.
    comparison: str  #: Model, prompts and settings that it shares with the rows it is compared with.
    group: str
    n_prompts: int  #: Prompts of the group.
    failed: int  #: Those that it failed for.
    #: By measure: over prompts of the group, ``general_loss`` over general prompts. ``paired`` is the difference to the
    #: localizer that others are compared with, its p corrected over the rows of the group.
    values: dict[str, Aggregate]
    settings: dict[str, Any] = {}  #: Of the localizer.


class LocalizerTable(Versioned):
    """The localizers of a run: ``localizers.json``."""

    name: str
    against: dict[str, str]  #: By comparison, the label of the localizer that others are compared with.
    measures: dict[str, MetricInfo]  #: What each measure is, in the order of columns.
    rows: list[LocalizerRow]


class RegionImage(Entry):
    """How well a heat map says where an image is memorized."""

    seed: int  #: Number of the image among those of the prompt, from 0.
    #: Root mean squared difference to the nearest training image where the mask is white; None without training images.
    distance: float | None = None
    #: Whether its map counts: an image of a memorized prompt that is unlike the training images does not.
    counts: bool
    iou: float | None = None  #: Intersection over union at the prompt's threshold, of an image that counts.
    average_precision: float | None = None  #: Of its pixels, where some are memorized and some are not.


class RegionPrompt(Entry):
    """A prompt of a localizer of regions."""

    prompt: str  #: Its id.
    group: str  #: Its kind, or ``general``.
    share: float  #: Share of the pixels that are memorized.
    #: Of maps scaled to [0, 1], the best for the half of the prompts that it is not in; None without such.
    threshold: float | None = None
    images: list[RegionImage] = []  #: None where no heat map is finite.
    sheet: str | None = None  #: Picture in the cell's folder: images, heat maps, marked pixels, and the truth.


class RegionSet(Entry):
    """How well a localizer of regions does over a set of images."""

    prompts: int  #: Prompts with an image that counts.
    images: int  #: Images that count.
    share: float  #: Share of the pixels that are memorized, the value of marking everything.
    iou: float | None = None  #: Each half of the prompts at the best threshold of the other half.
    best_iou: float  #: At the best threshold of all.
    threshold: float  #: That threshold, of maps scaled to [0, 1].
    rest_iou: float  #: Of what is neither marked nor memorized, at that threshold.
    average_precision: float | None = None  #: Mean over images that are memorized in part.


class RegionRow(Entry):
    """A localizer of regions on a model and a prompt list."""

    cell: str
    label: str  #: Title, and the settings by which it differs from others of this title.
    model: str
    localizer: str  #: Its name.
    prompts: str  #: Name of the prompt list.
    #: ``partial``: images of prompts memorized in part; ``all``: of every prompt whose truth is known.
    sets: dict[Literal["partial", "all"], RegionSet]
    masks: str = ""  #: Digest of the masks given.
    left_out: int  #: Images of memorized prompts that are unlike the training images.
    unchecked: int = 0  #: Images of memorized prompts without training images, which all count.
    unknown: int  #: Memorized prompts without a mask.
    failed: int  #: Prompts whose heat maps are not finite.
    threshold: float  #: The best over all prompts.
    cost: dict[str, float]  #: Mean UNet passes and seconds of a prompt.
    settings: dict[str, Any]  #: Of the localizer.
    results: list[RegionPrompt]  #: One entry a prompt.
    citations: dict[str, str] = {}  #: BibTeX by title.


class RegionTable(Versioned):
    """The localizers of regions of a run: ``regions.json``."""

    name: str
    rows: list[RegionRow]


class Operating(Entry):
    """What a threshold does: pairs beyond it count as copies."""

    threshold: float  #: In the metric's own values, below it for a distance and above it for a similarity.
    tpr: float  #: True positive rate: copies that are found.
    fpr: float  #: False positive rate: other pairs that count as copies.


class SimilarityRow(Entry):
    """How well a metric tells copies from other pairs of images, once the images are changed in one way."""

    metric: str
    transformation: str  #: See :data:`nemo_bench.metrics.transformations.TRANSFORMATIONS`.
    roc: Roc  #: Copies are ``memorized``, other pairs ``other``; a distance counts with its sign turned.
    best: Operating  #: The threshold of the largest difference of both rates, for these images.
    unchanged: Operating  #: That of unchanged images, on these images.
    published: Operating | None = None  #: A threshold that was published, on these images.
    flagged: dict[str, float]  #: By kind of pair, the share that the threshold of unchanged images calls copies.


class PairKind(Entry):
    """Pairs of one kind, such as images of general prompts beside a training picture."""

    is_copy: bool
    pairs: int


class SimilarityTable(Versioned):
    """How well metrics of similarity tell copies from other images: ``similarity.json``."""

    name: str
    source: str  #: Where the pairs come from.
    kinds: dict[str, PairKind]
    metrics: dict[str, MetricInfo]
    rows: list[SimilarityRow]
    left_out: dict[str, str]  #: Why, by metric.


class SinksRow(Entry):
    """A cell of an experiment with memorization sinks, over a group of prompts."""

    cell: str
    label: str  #: Title, settings by which it differs from others of this title, and model.
    model: str
    training: dict[str, Any] | None = None  #: Recipe of the model's training, where it is known.
    prompts: str  #: Name of the prompt list.
    comparison: str  #: Prompts and settings that it shares with the rows it is compared with.
    group: str
    n_prompts: int  #: Prompts of the group.
    values: dict[str, Aggregate]  #: By measure.


class SinksTable(Versioned):
    """What sinks do beside their controls: ``memsinks.json``."""

    name: str
    measures: dict[str, MetricInfo]  #: What each measure is, in the order of columns.
    rows: list[SinksRow]


class Thumbnail(Entry):
    """A small picture; ``thumbnails.json`` has one by name, size, time and box of its image."""

    uri: str  #: WebP as a data URI.
    width: int  #: In pixels.
    height: int  #: In pixels.
    tiny: bool  #: The image was not made smaller, so its pixels may be shown as squares.


class Tracked(Entry):
    """The last W&B run of a cell: ``tracked.json``."""

    id: str  #: Of the W&B run.
    project: str
    entity: str | None = None
    mode: str
    results: str = ""  #: Hash of the logged results; empty until the cell is finished and they are logged.
    url: str | None = None  #: Of the W&B run, unless it is offline.


class LastStep(Entry):
    """How far the step axis of a cell's logs is, so that it goes on where the cell does: ``step.json``."""

    step: int


Layers = dict[str, int]
"""Widths of value layers by name, in network order: ``layers.json``."""


class Network(Entry):
    """The part of a model that denoises: ``network.json``."""

    weights: int  #: Number of weights.
    #: Floating point operations of a pass of one sample, a multiplication and an addition counted as two.
    flops_per_pass: int


Sets = dict[str, dict[str, float | None]]
"""Scores of whole sets of images by group and metric, None where not finite: ``sets.json``."""

_RUN = "the command of the run writes it again, and computes nothing twice"
_SCORE = "nemo-bench score, with its folder, writes it again"
_REPORT = "nemo-bench report writes it again"
FILES: Mapping[str, tuple[Any, str]] = {
    "run.json": (Run, "the command of the run writes it again, with all cells that are in the folder"),
    "spec.json": (Spec, _RUN),
    "env.json": (list[Start], _RUN),
    "prompts.jsonl": (None, _RUN),
    "failure.json": (Failure, "it is needed by nothing, and the command of the run tries the cell again"),
    "layers.json": (Layers, _RUN),
    "fit.json": (Cost, "without it the cost of the fit is not known"),
    "network.json": (Network, "without it nothing is said of floating point operations"),
    "scoring.json": (Scoring, _SCORE),
    "sets.json": (Sets, _SCORE),
    "metrics.json": (Summary, f"{_SCORE}; that of a detector, nemo-bench detect"),
    "audit.json": (list[Audit], "the commands of the audits write it again, and compute nothing twice"),
    "threshold.json": (Threshold, "the next run that needs it writes it again from its records"),
    "leaderboard.json": (Leaderboard, _REPORT),
    "detection.json": (DetectionTable, _REPORT),
    "localizers.json": (LocalizerTable, _REPORT),
    "regions.json": (RegionTable, "the command nemo-bench regions writes it again, and computes nothing twice"),
    "similarity.json": (SimilarityTable, "the command nemo-bench similarity writes it again"),
    "thumbnails.json": (dict[str, Thumbnail], _REPORT),
    "tracked.json": (Tracked, "nemo-bench track writes it again"),
    "step.json": (LastStep, "the steps of live figures then begin with the number of records"),
}
"""The type of every file, None for lines of prompts, and what writes a file again that was deleted."""
