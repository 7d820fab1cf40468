"""NeMo: gate, initial selection and refinement for one prompt (Hintersdorf et al. 2024, section 3 and algorithm 1).

The result is that of the published sequence of tests, but for ties where the selection ran out: the limit is then a
similarity that was reached, which neurons without effect reach again but for rounding; they are kept. A test blocks a
set of neurons, and passes if the noise differences of all seeds change. It takes fewer passes here: a test fails with
its first failing seed, the computation before the tested layer is replayed, and tests run in batches on guesses about
the tests before them; a test whose guesses were wrong is repeated. Where similarities depend on the seeds compared at
once (see :data:`nemo_bench.diffusion.Measure`), every test takes all seeds in a batch of its own, and only replaying is
left.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from nemo_bench.diffusion import GRADIENT_MEMORY, Conditioning, Diffusion, Measure, Prefix
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.errors import ConfigError, NotFiniteError
from nemo_bench.localization.calibration import Calibration, activations
from nemo_bench.localization.noise_differences import noise_differences, pair_similarities, pair_values, similarity
from nemo_bench.localization.protocol import PAPER, PROTOCOLS, Protocol, Velocity
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.io import batched
from nemo_bench.records.ranges import NotNegative, Positive

Neuron = tuple[str, int]
Candidates = list[Neuron]
"""Neurons as (layer, index), by layer in network order, within a layer in the order of selection."""

SLOPE_SEEDS = 3
"""Seeds, the hardest ones, whose slopes rank the neurons in bisection."""
POINTS = 8
"""Numbers of neurons that bisection tests in one batch."""
ROUNDING = 1e-5
"""Largest difference of similarities between batches of different sizes in single precision."""
HALF_ROUNDING = 1e-3
"""The same in half precision."""
REACH = 3
"""Tests in a batch of the refinement, for each that the batch before decided."""
NEAR = 0.05
"""Distance from the limit within which ``refinement="margin"`` tests a seed with every neuron."""
LAST_K = 1280
"""The selection ends before this number of most active neurons of a layer is tested."""
Threshold = Annotated[float, Field(ge=-1, le=1)]
"""A threshold of a similarity, -1 to 1."""


@dataclass(eq=False)
class NemoSettings:
    """Settings of the published algorithm and of its sensitivity studies; see also :class:`nemo_bench.methods.NeMo`."""

    theta: Positive = 5.0  #: First outlier threshold, in standard deviations; it falls by ``theta_step`` per round.
    theta_step: Positive = 0.25
    theta_min: NotNegative = 1.0  #: End of the search; never tested itself.
    factor: float = field(default=0.0, kw_only=True)  #: Multiplies the outputs of blocked neurons; 0 switches them off.
    threshold: Threshold | None = None  #: Memorization threshold; None takes the calibrated one (published: 0.428).
    outliers: bool = True  #: Whether outliers are candidates; otherwise the search ends with k alone, before 1280.
    top_k: bool = True  #: Whether the most active neurons of each layer are candidates.
    #: Threshold of the refinement, or None for that of the selection. If the selection is exhausted, the similarity
    #: that it reached is the threshold in any case.
    refine_threshold: Threshold | None = None
    #: Refine by relative change instead: a neuron is dropped if the similarity of every seed stays within this part of
    #: the similarity with all candidates blocked.
    relative: Positive | None = None
    #: ``"sequential"``, as published; ``"margin"``, the same sequence on the seeds near the threshold, where the others
    #: are tested at the end of a layer only; or ``"bisect"``: drops many neurons at a time and then checks that all
    #: seeds stay changed and that no further neuron can be dropped, or goes on by margin where it does not pay.
    refinement: Literal["sequential", "margin", "bisect"] = "sequential"
    #: Threshold on the most similar pair of seeds of a prompt: ``"pairs"``, as published, the memorization threshold,
    #: which is calibrated from all pairs; or ``"maxima"``, calibrated from the most similar pair of each general
    #: prompt, which far fewer general prompts pass.
    gate: Literal["pairs", "maxima"] = "pairs"
    #: Blocked neurons if the selection is exhausted before all seeds have changed: ``"block"``, as published, the
    #: refinement of the last candidates; or ``"nothing"``.
    when_exhausted: Literal["block", "nothing"] = "block"
    #: Similarity of two seeds above which they are kept, or None for that of ``gate``.
    gate_threshold: Threshold | None = None
    #: Most active neurons of each layer in the first round; each round takes one more.
    initial_k: Annotated[int, Field(ge=0, lt=LAST_K)] = 0


@dataclass(eq=False)
class NemoSearch(NemoSettings):
    """The published algorithm in one of its protocols."""

    #: ``"paper"``, or ``"reference"`` for the public scripts; see :class:`Protocol`.
    protocol: Literal["paper", "reference"] = "paper"
    neurons: Literal["refined", "initial"] = "refined"  #: Blocked set: ``"refined"`` or the ``"initial"`` candidates.
    #: Measure of noise differences: ``"published"``, ``"current"`` or ``"fixed"``, see
    #: :data:`nemo_bench.diffusion.Measure`; None takes the protocol's.
    similarity: Measure | None = None
    #: Noise differences of a model that predicts velocity: of ``"converted"`` noise or ``"raw"`` velocity; None takes
    #: the protocol's.
    velocity: Velocity | None = None
    #: Guidance scale while localizing, with the two halves swapped as in the public scripts: conditional + scale
    #: (unconditional - conditional). None takes the conditional prediction.
    guidance: Positive | None = None

    def check_settings(self) -> None:
        """Raises ConfigError where settings contradict each other."""
        if self.theta <= self.theta_min:
            raise ConfigError(f"NeMo: theta={self.theta}; expected more than theta_min={self.theta_min}")
        if not (self.outliers or self.top_k):
            raise ConfigError("NeMo needs candidates: set outliers=true, top_k=true or both")

    @property
    def own_protocol(self) -> Protocol:
        """The protocol, with what the settings change in it."""
        return PROTOCOLS[self.protocol].changed(self.similarity, self.velocity, self.guidance)

    @property
    def needs_threshold(self) -> bool:
        """Whether a threshold is to be calibrated."""
        return self.threshold is None or (self.gate == "maxima" and self.gate_threshold is None)

    def search(
        self, model: Diffusion, prompt: Prompt, calibration: Calibration | None, latents: Tensor, batch_size: int
    ) -> Localization:
        """The neurons of one prompt; see :func:`localize`, whose errors it raises."""
        if calibration is None:
            raise ConfigError("NeMo needs a calibration: call calibrate(model, prompts), or setup with a calibration")
        text = model.encode([prompt.text])
        result = localize(model, text, latents, calibration, self, self.own_protocol, batch_size)
        blocks_nothing = bool(result.exhausted) and self.when_exhausted == "nothing"
        if self.neurons == "refined" or blocks_nothing:
            return result
        return replace(result, neurons=result.initial, listed=result.listed_initial, refined_score=result.initial_score)


@dataclass(eq=False)
class Trial:
    """Similarities of the noise differences of one prompt with and without blocked neurons.

    See :func:`localize` for the arguments. A prompt is ``joint`` if a similarity depends on the seeds compared at once.
    Every test then takes all seeds through the UNet in a batch of its own, as the public scripts do, and compares all
    kept seeds at once. ``row_passes`` counts UNet passes, one for each row, also those that start at a replayed prefix.
    """

    model: Diffusion
    text: Conditioning
    latents: Tensor
    factor: float = 0.0
    protocol: Protocol = PAPER
    batch_size: int = 32

    def __post_init__(self) -> None:
        self.joint = self.protocol.similarity != "fixed"
        self.row_passes = 0
        self._prefix: Prefix | None = None
        self._kept = list(range(len(self.latents)))
        self._known: dict[Neurons, Tensor] = {}

    @cached_property
    @torch.no_grad()
    def original(self) -> Tensor:
        """Noise differences of the kept seeds with nothing blocked."""
        return torch.cat([self._differences(rows) for rows in batched(self._kept, self.batch_size)])

    @property
    def rounding(self) -> float:
        """Largest difference of a similarity between batches."""
        if self.joint:
            return 0.0
        half = self.protocol.autocast and self.model.device.type == "cuda"
        return HALF_ROUNDING if half or self.model.dtype != torch.float32 else ROUNDING

    @property
    def seeds(self) -> int:
        """Number of kept seeds."""
        return len(self.original)

    def rows(self, seeds: int) -> int:
        """Number of UNet passes, one for each row, of a test on some seeds."""
        return self._passes * (len(self.latents) if self.joint else seeds)

    def keep(self, seeds: Tensor) -> None:
        """Keeps the seeds of a boolean mask, (S,)."""
        self.original = self.original[seeds]
        if self.joint:
            self._kept = [row for row, is_kept in zip(self._kept, seeds.tolist(), strict=True) if is_kept]
        else:
            self.latents = self.latents[seeds]
            self._kept = list(range(self.seeds))

    def similarities(self, tests: Sequence[tuple[Candidates, Sequence[int]]], layer: str | None = None) -> list[Tensor]:
        """Similarities of the noise differences with and without blocked neurons, of several tests in one batch.

        A test is blocked neurons and tested seeds; it gives one similarity a seed, on the CPU. Passes may start at a
        value layer before which all tests block the neurons of the recording.
        """
        if self.joint:
            return [self._of_all_seeds(as_neurons(blocked), layer)[list(seeds)] for blocked, seeds in tests]
        rows: list[tuple[int, Neurons]] = []
        for blocked, seeds in tests:
            neurons = as_neurons(blocked)
            rows += [(seed, neurons) for seed in seeds]
        values = [torch.empty(0)]
        for part in batched(rows, self.batch_size):
            part_seeds = [seed for seed, _ in part]
            changed = self._differences(part_seeds, [neurons for _, neurons in part], layer)
            values.append(self._similarity(part_seeds, changed).cpu())
        return list(torch.cat(values).split([len(seeds) for _, seeds in tests]))

    def record(self, candidates: Candidates) -> Tensor:
        """Blocks candidates for all seeds and records the computation before each layer for later tests.

        Nothing is recorded for a compiled network, which has no parts to replay, and under guidance, which takes two
        passes. Returns one similarity a seed.
        """
        seeds = range(self.seeds)
        if self.model.compiled or self.protocol.guidance is not None:
            return self.similarities([(candidates, seeds)])[0]
        self._known.clear()
        self._prefix = self.model.prefix({layer for layer, _ in candidates})
        with self._prefix.recording():
            return self.similarities([(candidates, seeds)])[0]

    def slopes(self, candidates: Candidates, seeds: Sequence[int]) -> Tensor:
        """First-order change of the similarities if one candidate becomes active, (candidates, seeds), on the CPU."""
        layers = self.model.masks.widths
        columns = []
        with torch.inference_mode(False), torch.enable_grad():
            for part in batched(seeds, max(1, self.batch_size // GRADIENT_MEMORY)):
                self.row_passes += 2 * self._passes * len(part)
                factors = self.model.masks.factors([as_neurons(candidates)] * len(part), self.factor)
                for values in factors.values():
                    values.requires_grad_()
                text = self.text.rows([0] * len(part)).clone()
                with self.model.masks.scale(factors):
                    latents = self.latents[[self._kept[seed] for seed in part]].clone()
                    changed = noise_differences(self.model, text, latents, self.protocol)
                values = self._similarity(part, changed)
                slopes = dict(zip(layers, torch.autograd.grad(values.sum(), list(factors.values())), strict=True))
                columns.append(torch.stack([slopes[layer][:, index] for layer, index in candidates]).cpu())
        return torch.cat(columns, 1) * (1 - self.factor)

    @property
    def _passes(self) -> int:
        return 1 if self.protocol.guidance is None else 2

    def _similarity(self, seeds: Sequence[int], changed: Tensor) -> Tensor:
        original = self.original[list(seeds)].clone()
        values = similarity(original, changed, self.model.similarity, self.protocol.similarity)
        # A comparison with nan is never true, so nan would pass every test.
        require_finite("noise differences with neurons blocked", values)
        return values

    def _of_all_seeds(self, blocked: Neurons, layer: str | None) -> Tensor:
        """Similarities of all kept seeds, computed once for equal neurons."""
        if blocked not in self._known:
            parts = batched(range(len(self.latents)), self.batch_size)
            changed = torch.cat([self._differences(part, [blocked] * len(part), layer) for part in parts])
            self._known[blocked] = self._similarity(range(self.seeds), changed[self._kept]).cpu()
        return self._known[blocked]

    def _differences(
        self, seeds: Sequence[int], blocked: Sequence[Neurons] | None = None, layer: str | None = None
    ) -> Tensor:
        self.row_passes += self._passes * len(seeds)
        text, latents = self.text.rows([0] * len(seeds)), self.latents[list(seeds)]
        if not blocked:
            return noise_differences(self.model, text, latents, self.protocol)
        if layer is None or self._prefix is None:
            with self.model.block(blocked, self.factor):
                return noise_differences(self.model, text, latents, self.protocol)
        replayed = [name for name in self.model.value_layers if self._prefix.skips(name, layer)]
        with self._prefix.replaying(layer, seeds), self.model.block(blocked, self.factor, replayed):
            return noise_differences(self.model, text, latents, self.protocol)


def as_listed(candidates: Iterable[Neuron]) -> dict[str, tuple[int, ...]]:
    """The indices of candidates by layer, in their order and with repetitions."""
    layers: dict[str, list[int]] = {}
    for layer, index in candidates:
        layers.setdefault(layer, []).append(index)
    return {layer: tuple(ids) for layer, ids in layers.items()}


def as_neurons(candidates: Iterable[Neuron]) -> Neurons:
    """The set of candidates."""
    return Neurons(as_listed(candidates))


def select(
    activation: dict[str, Tensor],
    calibration: Calibration,
    theta: float,
    k: int,
    settings: NemoSettings,
    *,
    duplicates: bool = False,
) -> Candidates:
    """Selects the candidates of one round: in each layer the outliers by index, then the k most active neurons.

    The most active one comes first, and a neuron of both kinds may be listed twice. Activations are those of one prompt
    by layer, each (neurons,); ``theta`` is in standard deviations.
    """
    candidates: Candidates = []
    for layer, values in activation.items():
        values = values.cpu()
        deviation = (values - calibration.mean[layer]).abs() / calibration.std[layer]
        outliers = (deviation > theta).nonzero()[:, 0].tolist() if settings.outliers else []
        most_active = values.topk(min(k, len(values))).indices.tolist() if settings.top_k else []
        indices = [*outliers, *most_active]
        candidates += [(layer, index) for index in (indices if duplicates else dict.fromkeys(indices))]
    return candidates


def selection_rounds(
    activation: dict[str, Tensor], calibration: Calibration, settings: NemoSettings, *, duplicates: bool
) -> Iterator[Candidates]:
    """The candidates of all rounds of the initial selection (see :func:`select`), without repeated rounds."""
    # Steps such as 0.1 reach the end of the search only up to rounding; the end itself is never tested.
    steps = math.ceil((settings.theta - settings.theta_min) / settings.theta_step - 1e-9)
    rounds = LAST_K - settings.initial_k
    before: Candidates | None = None
    for number in range(min(steps, rounds) if settings.outliers else rounds):
        theta = settings.theta - number * settings.theta_step
        candidates = select(
            activation, calibration, theta, settings.initial_k + number, settings, duplicates=duplicates
        )
        if candidates != before:
            yield candidates
        before = candidates


def initial_selection(
    trial: Trial, activation: dict[str, Tensor], calibration: Calibration, tau: float, settings: NemoSettings
) -> tuple[Candidates, Tensor, bool]:
    """Adds candidates round by round until blocking them changes the noise differences of every kept seed.

    Rounds do not depend on one another, so several are tested on one seed in a batch; a round that fails there fails.
    The result is the first round with all similarities at most ``tau``, or the last round; the similarities of all kept
    seeds with its candidates blocked; and whether none is above ``tau``.
    """
    remaining = selection_rounds(activation, calibration, settings, duplicates=trial.protocol.duplicates)
    together = 1 if trial.joint else trial.batch_size
    order = list(range(trial.seeds))
    pending: list[Candidates] = []
    latest: Candidates = []
    while True:
        pending += islice(remaining, together - len(pending))
        if not pending:
            return latest, trial.similarities([(latest, range(trial.seeds))])[0], False
        tested = trial.similarities([(candidates, order[:1]) for candidates in pending])
        passed = next((number for number, value in enumerate(tested) if float(value) <= tau), None)
        if passed is None:
            latest = pending[-1]
            pending = []
            continue
        latest = pending[passed]
        values = tested[0].new_empty(trial.seeds)
        values[order] = torch.cat([tested[passed], *trial.similarities([(latest, order[1:])])])
        if float(values.max()) <= tau:
            return latest, values, True
        order = values.argsort(descending=True).tolist()
        pending = pending[passed + 1 :]


Excess = Callable[[Tensor, Sequence[int]], Tensor]
"""By how much similarities of seeds exceed the limit of the refinement; a test fails if one is at least 0."""


@dataclass(eq=False)
class Refinement:
    """Drops every layer, then every neuron, without which the noise differences stay changed."""

    trial: Trial  # of the kept seeds
    kept: Candidates  # first those of the initial selection
    values: Tensor  # similarities of all seeds with them blocked
    excess: Excess
    _untested: list[int] = field(default_factory=list, init=False)  # seeds whose values are those of an earlier set
    _reach: int = field(default=REACH, init=False)  # tests in the next batch

    def sequential(self, near: float = math.inf) -> None:
        """Tests one by one, as published: layers from the last to the first, then neurons in the same order.

        Seeds farther below the limit than ``near`` are tested at the end of each layer only. If one has crossed the
        limit there, the neurons of the layer are tested again, on all seeds.
        """
        if self.trial.joint:
            near = math.inf  # every test takes all seeds
        for layer in self._layers():
            rest = [neuron for neuron in self.kept if neuron[0] != layer]
            hardest = self._hardest_first()[:1]
            self._accept(rest, hardest, self.trial.similarities([(rest, hardest)])[0])
        self.values = self.trial.record(self.kept)
        for layer in self._layers():
            before = self.kept, self.values
            self._drop_in_order(layer, near)
            if not self._far_seeds_pass(layer):
                self.kept, self.values = before
                self._drop_in_order(layer)

    def bisect(self) -> None:
        """Drops many neurons at a time: first those with the smallest slopes, then those that can be dropped alone.

        The sequence takes a row for each seed to record and to drop a neuron, and at least one row to keep a neuron.
        Where bisection has cost more than that, the sequence goes on with what is left, on seeds near the limit.
        """
        self.kept = list(dict.fromkeys(self.kept))
        count = len(self.kept)
        start = self.trial.row_passes
        # Ranking by slopes leaves every neuron to be tested once more, as the sequence does.
        for ranking, tests in ((self._by_slope, count), (self._removable, 0)):
            found = True
            while self.kept and found:
                dropped = count - len(self.kept)
                affordable = self.trial.rows(self.trial.seeds) * (1 + dropped) + self.trial.rows(1) * tests
                if self.trial.row_passes - start > affordable:
                    self.sequential(NEAR)
                    return
                found = self._drop_first_of(ranking())

    def _by_slope(self) -> Candidates:
        """All neurons by their largest slope on the hardest seeds, the smallest first."""
        slopes = self.trial.slopes(self.kept, self._hardest_first()[:SLOPE_SEEDS]).amax(1).tolist()
        return [neuron for _, neuron in sorted(zip(slopes, self.kept, strict=True))]

    def _removable(self) -> Candidates:
        """A neuron that can be dropped alone, then others that perhaps can; none if no neuron can."""
        hardest, *others = self._hardest_first()
        passed = self._dropped_alone(self.kept, [hardest])
        for number, neuron in enumerate(passed):
            # Most tests that fail do so on the hardest seeds.
            if self._dropped_alone(self._dropped_alone([neuron], others[:2]), others[2:]):
                return passed[number:]
        return []

    def _dropped_alone(self, neurons: Sequence[Neuron], seeds: list[int]) -> Candidates:
        """Those of some neurons that can be dropped alone for some seeds, the one with the smallest effect first."""
        tested = self.trial.similarities([(_without(self.kept, neuron), seeds) for neuron in neurons])
        excesses = [float(self.excess(values, seeds).max()) if seeds else -math.inf for values in tested]
        return [neuron for excess, neuron in sorted(zip(excesses, neurons, strict=True)) if excess < 0]

    def _drop_first_of(self, order: Candidates) -> bool:
        """Searches the largest number of first neurons that can be dropped together; returns whether any can."""
        candidates = self.kept
        dropped = 0
        limit = len(order)
        while dropped < limit:
            counts = sorted({dropped + math.ceil((limit - dropped) * step / POINTS) for step in range(1, POINTS + 1)})
            rests = {count: [neuron for neuron in candidates if neuron not in order[:count]] for count in counts}
            largest = self._accept_largest(rests)
            dropped = max(dropped, largest)
            limit = next((count for count in counts if count > largest), limit + 1) - 1
        return dropped > 0

    def _accept_largest(self, rests: Mapping[int, Candidates]) -> int:
        """Keeps what the largest possible number of dropped neurons, in rising order, leaves; returns it, or 0.

        All numbers are tested on the hardest seed. If the largest that passes there fails on other seeds, the smaller
        ones are tested on the worst of these next.
        """
        seeds = self._hardest_first()[:1]
        passed = dict.fromkeys(rests, self.values[:0])
        while passed:
            tested = self.trial.similarities([(rests[count], seeds[-1:]) for count in passed])
            passed = {
                count: torch.cat([known, values])
                for (count, known), values in zip(passed.items(), tested, strict=True)
                if not self._fails(values, seeds[-1:])
            }
            if passed:
                largest, known = passed.popitem()
                others = [seed for seed in self._hardest_first() if seed not in seeds]
                values = self._completed(rests[largest], seeds, known, others)
                excess = self.excess(values, range(self.trial.seeds))
                if float(excess.max()) < 0:
                    self.kept = rests[largest]
                    self.values = values
                    return largest
                seeds.append(int(excess.argmax()))
        return 0

    def _layers(self) -> list[str]:
        return list(dict.fromkeys(layer for layer, _ in self.kept))[::-1]

    def _drop_in_order(self, layer: str, near: float = math.inf) -> None:
        """Tests the neurons of a layer in order, several in a batch, on the seeds that are near the limit.

        The first wrong guess ends a batch: the tests after it started from other candidates, and serve as guesses only.
        """
        queue = deque(neuron for neuron in self.kept if neuron[0] == layer)
        effects: dict[Neuron, float] = {}
        while queue:
            order = self._hardest_first(near)
            if not self._fails(self.values, range(self.trial.seeds)):
                self._drop_repeated(queue)
            plan = self._plan(islice(queue, self._reach), effects, order)
            results = self.trial.similarities([(rest, seeds) for rest, seeds, _ in plan], layer)
            before = float(self.values[order[0]])
            for neuron, (*_, should_pass), values in zip(queue, plan, results, strict=False):
                effects[neuron] = float(values[0]) - before
                if should_pass:
                    before = float(values[0])
            for decided, ((rest, seeds, should_pass), values) in enumerate(zip(plan, results, strict=True), 1):
                self._reach = REACH * decided
                queue.popleft()
                if self._accept(rest, seeds, values, layer, near) != should_pass:
                    break

    def _plan(
        self, queue: Iterable[Neuron], effects: dict[Neuron, float], order: list[int]
    ) -> list[tuple[Candidates, Sequence[int], bool]]:
        """Plans a batch of tests by the known effects of neurons on the similarity of the hardest seed.

        Gives for the first neurons the candidates that stay blocked if all guesses are right, the tested seeds, and
        whether the test should pass; one that should fail takes the hardest seed alone.
        """
        plan: list[tuple[Candidates, Sequence[int], bool]] = []
        rows = 0
        rest = self.kept
        expected = float(self.values[order[0]])
        for neuron in queue:
            guess = expected + effects.get(neuron, math.inf)
            should_pass = not self._fails(torch.tensor([guess]), order[:1])
            seeds = order if should_pass else order[:1]
            rows += len(seeds)
            if plan and (rows > self.trial.batch_size or self.trial.joint):
                break
            without = _without(rest, neuron)
            plan.append((without, seeds, should_pass))
            if should_pass:
                rest = without
                expected = guess
        return plan

    def _drop_repeated(self, queue: deque[Neuron]) -> None:
        """Drops one entry of every neuron listed twice: the other entry blocks it, so this test passes."""
        for neuron in list(queue):
            if self.kept.count(neuron) > 1:
                queue.remove(neuron)
                self.kept = _without(self.kept, neuron)

    def _accept(
        self, rest: Candidates, seeds: Sequence[int], values: Tensor, layer: str | None = None, near: float = math.inf
    ) -> bool:
        """Keeps ``rest`` alone if its test passes on all seeds near the limit; similarities of some seeds are known."""
        if self._fails(values, seeds):
            return False
        others = [seed for seed in self._hardest_first(near) if seed not in seeds]
        complete = self._completed(rest, seeds, values, others, layer)
        if self._fails(complete, range(self.trial.seeds)):
            return False
        self.kept = rest
        self.values = complete
        self._untested = [seed for seed in range(self.trial.seeds) if seed not in (*seeds, *others)]
        return True

    def _completed(
        self, rest: Candidates, seeds: Sequence[int], values: Tensor, others: Sequence[int], layer: str | None = None
    ) -> Tensor:
        """Similarities of all seeds: known ones of some seeds, those of others by a test, and the last ones."""
        complete = self.values.clone()
        complete[list(seeds)] = values
        if others:
            complete[list(others)] = self.trial.similarities([(rest, others)], layer)[0]
        return complete

    def _far_seeds_pass(self, layer: str) -> bool:
        """Tests the seeds that the last accepted test left out."""
        far = self._untested
        self._untested = []
        if far:
            self.values[far] = self.trial.similarities([(self.kept, far)], layer)[0]
        return not self._fails(self.values[far], far)

    def _hardest_first(self, near: float = math.inf) -> list[int]:
        """The hardest seed, then those of the others that are near the limit, the hardest first."""
        excesses = self.excess(self.values, range(self.trial.seeds))
        order: list[int] = excesses.argsort(descending=True).tolist()
        return order[: max(1, int((excesses > -near).sum()))]

    def _fails(self, values: Tensor, seeds: Sequence[int]) -> bool:
        return bool((self.excess(values, seeds) >= 0).any())


def _without(candidates: Candidates, neuron: Neuron) -> Candidates:
    """The candidates without the first entry of a neuron."""
    rest = list(candidates)
    rest.remove(neuron)
    return rest


def above(limit: float) -> Excess:
    """Limits similarities to values below ``limit``."""
    return lambda values, seeds: values - limit


def away_from(base: Tensor, part: float) -> Excess:
    """Limits the change of similarities from their base, one a seed, to less than a part of it."""

    def excess(values: Tensor, seeds: Sequence[int]) -> Tensor:
        change = (values - base[list(seeds)]).abs() / base[list(seeds)].abs()
        # MS-SSIM can be exactly 0; from 0 to 0 is no change.
        return change.nan_to_num(nan=0.0, posinf=math.inf) - part

    return excess


@torch.no_grad()
def localize(
    model: Diffusion,
    text: Conditioning,
    latents: Tensor,
    calibration: Calibration,
    settings: NemoSettings,
    protocol: Protocol = PAPER,
    batch_size: int = 32,
) -> Localization:
    """Localizes the memorization neurons of one prompt.

    Args:
        model: The model, nothing blocked.
        text: Conditioning of one row.
        latents: Starting noise of S seeds, S at least 2, (S, channels, height, width).
        calibration: Statistics and threshold of the model.
        settings: Settings of the algorithm.
        protocol: Protocol of the noise differences.
        batch_size: Largest number of rows in a UNet pass.

    Returns:
        The localization, without neurons if no pair of seeds is more similar than the gate's threshold.

    Raises:
        ConfigError: There are fewer than two seeds, or the calibration has no threshold from maxima.
        NotFiniteError: The threshold, an activation or a noise difference is not finite.
    """
    if len(latents) < 2:
        raise ConfigError(f"localizing compares seeds with one another: it needs at least 2, given {len(latents)}")
    tau = calibration.threshold if settings.threshold is None else settings.threshold
    if not math.isfinite(tau):
        raise NotFiniteError("there is no memorization threshold: too many prompts of the calibration failed")
    trial = Trial(model, text, latents, settings.factor, protocol, batch_size)
    matrix = pair_similarities(trial.original, model.similarity, protocol.similarity)
    require_finite("noise differences with nothing blocked", pair_values(matrix))
    gate = calibration.gate(tau, settings.gate) if settings.gate_threshold is None else settings.gate_threshold
    gate_score = float(matrix.max())
    kept = matrix.amax(1) > gate
    if not kept.any():
        return Localization(
            gate_score=gate_score, threshold=gate, row_passes=trial.row_passes, passed_gate=False, exhausted=False
        )
    trial.keep(kept)
    activation = {layer: values[0] for layer, values in activations(model, text).items()}
    for layer_values in activation.values():
        require_finite("activations of value neurons", layer_values)
    candidates, values, reached = initial_selection(trial, activation, calibration, tau, settings)
    initial_score = float(values.max())
    result = Localization(
        initial=as_neurons(candidates),
        gate_score=gate_score,
        initial_score=initial_score,
        refined_score=1.0,  # of unchanged noise differences
        threshold=tau,
        passed_gate=True,
        exhausted=not reached,
    )
    if not reached and settings.when_exhausted == "nothing":
        return replace(result, row_passes=trial.row_passes)
    if reached:
        limit = tau if settings.refine_threshold is None else settings.refine_threshold
        least = limit
    else:
        limit = initial_score
        # Tests compare with a similarity then, which may be rounded otherwise in another batch.
        least = limit - trial.rounding
    excess = above(least) if settings.relative is None else away_from(values, settings.relative)
    refinement = Refinement(trial, candidates, values, excess)
    if settings.refinement == "bisect":
        refinement.bisect()
    else:
        refinement.sequential(NEAR if settings.refinement == "margin" else math.inf)
    if protocol.duplicates:
        result = replace(result, listed=as_listed(refinement.kept), listed_initial=as_listed(candidates))
    return replace(
        result,
        neurons=as_neurons(refinement.kept),
        refined_score=float(refinement.values.max()),
        threshold=limit,
        row_passes=trial.row_passes,
    )
