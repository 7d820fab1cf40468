"""NeMo: gate, initial selection and refinement for one prompt (Hintersdorf et al. 2024, section 3 and algorithm 1).

The outcome is that of the published sequence of tests, each of which asks whether a set of blocked neurons keeps the
noise differences of all seeds changed. Fewer passes lead there: a test is lost with its first seed, what comes before
the layer under test is replayed, and tests are run together on guesses about the ones before them; a test counts only
if the guesses it was built on came true. Where similarities depend on which seeds are compared at once (see
:data:`nemo_bench.diffusion.Measure`), every test takes all seeds, alone in its batch, and only replaying is left.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from nemo_bench.diffusion import GRADIENT_MEMORY, Conditioning, Diffusion, Prefix
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.errors import ConfigError, NotFiniteError
from nemo_bench.localization.calibration import Calibration, activations
from nemo_bench.localization.noise_differences import noise_differences, pair_similarities, pair_values, similarity
from nemo_bench.localization.protocol import PAPER, Protocol
from nemo_bench.records.data import Localization, Neurons

Neuron = tuple[str, int]
Candidates = list[Neuron]
"""Neurons as (layer, index), layer by layer in network order, in a layer in the order of selection."""

SLOPE_SEEDS, POINTS = 3, 8
"""Of the hardest seeds so many say which neurons matter least; so many counts of neurons are tried together."""
ROUNDING, HALF_ROUNDING = 1e-5, 1e-3
"""A score closer than this below another one is taken to equal it, in single and in half precision, where batches of
different sizes gave the two."""
LAST_K = 1280
"""The selection ends before so many most active neurons of a layer are tried."""


@dataclass(frozen=True)
class NemoSettings:
    """The numbers of the published algorithm and the variants of its sensitivity studies.

    Attributes:
        theta: First outlier threshold, in standard deviations.
        theta_step: How much it falls per round.
        theta_min: Where the search ends; never tested itself.
        factor: What blocked outputs are multiplied by.
        threshold: Memorization threshold, or None for the calibrated one.
        outliers: Whether outliers are candidates; without them the search ends with k alone, before 1280.
        top_k: Whether the most active neurons of each layer are candidates.
        refine_threshold: Threshold of the refinement, or None for that of the selection. Where the selection runs out,
            the similarity that it reached is the threshold, whatever is given here.
        relative: Refine by relative change instead: a neuron is dropped if no seed's similarity differs from the one
            with all candidates blocked by more than this part of it.
        gate: What the gate compares the most alike pair of seeds of a prompt with: ``"pairs"``, as published, the
            threshold, which is calibrated from all pairs; or ``"maxima"``, a threshold calibrated from the most alike
            pair of each general prompt, which far fewer of those pass.
        when_exhausted: What is blocked where the selection runs out and the noise differences of some seed still look
            as before: ``"block"``, as published, what refinement keeps of the last candidates; or ``"nothing"``.
        refinement: ``"sequential"``, as published, or ``"bisect"``: drops many neurons at a time and then checks that
            the seeds stay changed and that no neuron that is left can be dropped.
        gate_threshold: Similarity of two seeds above which they are kept, or None for the threshold of the selection.
        initial_k: Most active neurons of each layer in the first round; each round takes one more.
    """

    theta: float = 5.0
    theta_step: float = 0.25
    theta_min: float = 1.0
    factor: float = 0.0
    threshold: float | None = None
    outliers: bool = True
    top_k: bool = True
    refine_threshold: float | None = None
    relative: float | None = None
    refinement: Literal["sequential", "bisect"] = "sequential"
    gate: Literal["pairs", "maxima"] = "pairs"
    when_exhausted: Literal["block", "nothing"] = "block"
    gate_threshold: float | None = None
    initial_k: int = 0


class Trial:
    """Noise differences of one prompt with neurons blocked, against those with none blocked.

    Args:
        model: The model, nothing blocked.
        text: Conditioning of one row.
        latents: Starting noise of S seeds, (S, channels, height, width).
        factor: What blocked outputs are multiplied by.
        protocol: How noise differences are taken.
        batch_size: Rows in a UNet pass at most.

    Attributes:
        original: Noise differences with nothing blocked, of the seeds kept.
        whole: Whether similarities depend on which seeds are compared at once. Every test then takes all seeds
            through the UNet in a batch of its own, as the public scripts do, and compares all kept ones at once.
        row_passes: UNet passes of one sample spent so far, those that start at a replayed prefix included.
    """

    def __init__(
        self,
        model: Diffusion,
        text: Conditioning,
        latents: Tensor,
        factor: float = 0.0,
        protocol: Protocol = PAPER,
        batch_size: int = 32,
    ) -> None:
        self.model, self.text, self.latents, self.factor = model, text, latents, factor
        self.protocol, self.batch_size = protocol, batch_size
        self.whole = protocol.similarity != "fixed"
        self.row_passes = 0
        self._prefix: Prefix | None = None
        self._kept = list(range(len(latents)))
        self._known: dict[Neurons, Tensor] = {}
        self.original = torch.cat([self._differences(rows) for rows in self._batches(range(len(latents)))])

    @property
    def rounding(self) -> float:
        """By how much another batch of the tests can change a similarity."""
        if self.whole:
            return 0.0
        half = self.protocol.autocast and self.model.device.type == "cuda"
        return HALF_ROUNDING if half or self.model.dtype != torch.float32 else ROUNDING

    @property
    def seeds(self) -> int:
        """Number of seeds kept."""
        return len(self.original)

    def keep(self, seeds: Tensor) -> None:
        """Goes on with some of the seeds only.

        Args:
            seeds: Boolean mask of S entries.
        """
        self.original = self.original[seeds]
        if self.whole:
            self._kept = [row for row, kept in zip(self._kept, seeds.tolist(), strict=True) if kept]
        else:
            self.latents = self.latents[seeds]
            self._kept = list(range(self.seeds))

    def similarities(self, tests: Sequence[tuple[Candidates, Sequence[int]]], layer: str | None = None) -> list[Tensor]:
        """Similarities of the noise differences with and without blocking, several tests in one batch where they may.

        Args:
            tests: What is blocked, and the seeds it is tested on.
            layer: Where the passes may start: all tests block, before this layer, what was blocked while recording.

        Returns:
            One similarity per seed for each test, on the CPU.
        """
        if self.whole:
            return [self._of_all(as_neurons(candidates), layer)[list(chosen)] for candidates, chosen in tests]
        seeds = [seed for _, chosen in tests for seed in chosen]
        blocked = [as_neurons(candidates) for candidates, _ in tests]
        rows = [neurons for neurons, (_, chosen) in zip(blocked, tests, strict=True) for _ in chosen]
        values = []
        for part in self._batches(range(len(rows))):
            changed = self._differences([seeds[i] for i in part], [rows[i] for i in part], layer)
            values.append(self._similarity([seeds[i] for i in part], changed).cpu())
        return list(torch.cat(values).split([len(chosen) for _, chosen in tests])) if values else []

    def record(self, candidates: Candidates) -> Tensor:
        """Blocks some candidates for all seeds and keeps what the passes compute before each layer.

        A compiled network has no parts that could be replayed, and guidance takes two passes; nothing is kept then.

        Returns:
            One similarity per seed.
        """
        if self.model.compiled or self.protocol.guidance is not None:
            return self.similarities([(candidates, range(self.seeds))])[0]
        self._known.clear()
        self._prefix = Prefix(self.model.unet, self.model.value_layers)
        with self._prefix.recording():
            return self.similarities([(candidates, range(self.seeds))])[0]

    def slopes(self, candidates: Candidates, seeds: Sequence[int]) -> Tensor:
        """First-order change of the similarities when a candidate is active again, the others staying blocked.

        Args:
            candidates: What is blocked.
            seeds: The seeds that count.

        Returns:
            Changes of shape (candidates, seeds), on the CPU.
        """
        layers = self.model.masks.widths
        columns = []
        with torch.inference_mode(False), torch.enable_grad():
            for part in self._batches(seeds, max(1, self.batch_size // GRADIENT_MEMORY)):
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
        # As a comparison that is never true it would pass every test.
        require_finite("noise differences with neurons blocked", values)
        return values

    def _of_all(self, blocked: Neurons, layer: str | None) -> Tensor:
        """Similarities of all kept seeds; equal neurons have equal ones, so they are computed once."""
        if blocked not in self._known:
            rows = self._batches(range(len(self.latents)))
            changed = torch.cat([self._differences(part, [blocked] * len(part), layer) for part in rows])
            self._known[blocked] = self._similarity(range(self.seeds), changed[self._kept]).cpu()
        return self._known[blocked]

    def _batches(self, rows: Sequence[int], size: int | None = None) -> list[Sequence[int]]:
        size = size or self.batch_size
        return [rows[i : i + size] for i in range(0, len(rows), size)]

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
    """The same neurons by layer, in their order and as often as they are there."""
    layers: dict[str, list[int]] = {}
    for layer, index in candidates:
        layers.setdefault(layer, []).append(index)
    return {layer: tuple(ids) for layer, ids in layers.items()}


def as_neurons(candidates: Iterable[Neuron]) -> Neurons:
    """The same neurons without their order."""
    return Neurons(as_listed(candidates))


def select(
    activation: dict[str, Tensor],
    calibration: Calibration,
    theta: float,
    k: int,
    settings: NemoSettings = NemoSettings(),
    *,
    duplicates: bool = False,
) -> Candidates:
    """Candidates of one round: outliers against general prompts, and the k most active neurons of each layer.

    Args:
        activation: Activation of one prompt by layer, each (neurons,).
        calibration: Statistics over general prompts.
        theta: Outlier threshold, in standard deviations.
        k: Number of most active neurons taken in each layer.
        settings: Which of the two kinds are candidates.
        duplicates: Whether a neuron that is both is listed twice.

    Returns:
        Layer by layer the outliers in index order, then the k most active in falling order.
    """
    chosen: Candidates = []
    for layer, values in activation.items():
        values = values.cpu()
        deviation = (values - calibration.mean[layer]).abs() / calibration.std[layer]
        outliers = (deviation > theta).nonzero()[:, 0].tolist() if settings.outliers else []
        most_active = values.topk(min(k, len(values))).indices.tolist() if settings.top_k else []
        found = [*outliers, *most_active]
        chosen += [(layer, index) for index in (found if duplicates else dict.fromkeys(found))]
    return chosen


@dataclass(frozen=True)
class Selection:
    """What the initial selection ended with.

    Attributes:
        candidates: The candidates.
        values: Similarities of all kept seeds with them blocked.
        reached: Whether none is above the threshold.
    """

    candidates: Candidates
    values: Tensor
    reached: bool


def initial_selection(
    trial: Trial, activation: dict[str, Tensor], calibration: Calibration, tau: float, settings: NemoSettings
) -> Selection:
    """Widens the candidates until blocking them changes the noise differences of every kept seed.

    The rounds do not depend on one another, so some are tried on one seed together; a round that is lost there is lost.

    Args:
        trial: The prompt, with its kept seeds.
        activation: Activation of the prompt by layer.
        calibration: Statistics over general prompts.
        tau: Threshold of the selection.
        settings: Where theta and k start, theta falls and ends.

    Returns:
        The first round that keeps all seeds at most at ``tau``, or the last one.
    """
    rounds = _rounds(activation, calibration, settings, duplicates=trial.protocol.duplicates)
    together = 1 if trial.whole else trial.batch_size
    order, open_rounds, latest = list(range(trial.seeds)), list[Candidates](), Candidates()
    while True:
        open_rounds += islice(rounds, together - len(open_rounds))
        if not open_rounds:
            return Selection(latest, trial.similarities([(latest, range(trial.seeds))])[0], False)
        tried = trial.similarities([(candidates, order[:1]) for candidates in open_rounds])
        chosen = next((place for place, value in enumerate(tried) if float(value) <= tau), None)
        if chosen is None:
            latest, open_rounds = open_rounds[-1], []
            continue
        latest = open_rounds[chosen]
        values = tried[0].new_empty(trial.seeds)
        values[order] = torch.cat([tried[chosen], *trial.similarities([(latest, order[1:])])])
        if float(values.max()) <= tau:
            return Selection(latest, values, True)
        order, open_rounds = values.argsort(descending=True).tolist(), open_rounds[chosen + 1 :]


def _rounds(
    activation: dict[str, Tensor], calibration: Calibration, settings: NemoSettings, *, duplicates: bool
) -> Iterator[Candidates]:
    """Candidates of each round; one that is the same as the round before is left out, since it changes nothing."""
    # Steps such as 0.1 add up to the end of the search by rounding only; the end itself is never tested.
    steps = math.ceil((settings.theta - settings.theta_min) / settings.theta_step - 1e-9)
    rounds = LAST_K - settings.initial_k
    before: Candidates | None = None
    for number in range(min(steps, rounds) if settings.outliers else rounds):
        theta, k = settings.theta - number * settings.theta_step, settings.initial_k + number
        candidates = select(activation, calibration, theta, k, settings, duplicates=duplicates)
        if candidates != before:
            yield candidates
        before = candidates


Excess = Callable[[Tensor, Sequence[int]], Tensor]
"""Similarities of some seeds to how far each is above what refinement allows; one seed above 0 loses a test."""


class Refinement:
    """Drops every layer, then every neuron, without which the noise differences stay changed.

    Args:
        trial: The prompt, with its kept seeds.
        candidates: What the initial selection found.
        values: Similarities of all seeds with them blocked.
        excess: How far similarities are above what is allowed.

    Attributes:
        kept: What remains, in the same order.
        values: Similarities of all seeds with it blocked.
    """

    def __init__(self, trial: Trial, candidates: Candidates, values: Tensor, excess: Excess) -> None:
        self.trial, self.kept, self.values, self._excess = trial, list(candidates), values, excess

    def sequential(self) -> None:
        """Tests one by one, as published: layers from the last to the first, then neurons in the same order."""
        for layer in self._layers():
            self._attempt([neuron for neuron in self.kept if neuron[0] != layer])
        self.values = self.trial.record(self.kept)
        for layer in self._layers():
            self._drop_in_order([neuron for neuron in self.kept if neuron[0] == layer], layer)

    def bisect(self) -> None:
        """Drops many neurons at a time: first those of little effect by first order, then those that can go alone."""
        self.kept = list(dict.fromkeys(self.kept))
        for ranking in (self._by_slope, self._removable):
            while self.kept and self._drop_first_of(ranking()):
                pass

    def _by_slope(self) -> Candidates:
        """All neurons, least effect first, to first order and on the hardest seeds."""
        slopes = self.trial.slopes(self.kept, self._hardest_first()[:SLOPE_SEEDS]).amax(1).tolist()
        return [neuron for _, neuron in sorted(zip(slopes, self.kept, strict=True))]

    def _removable(self) -> Candidates:
        """The neurons that can each go alone, least effect first; those that can't are mostly lost on one seed."""
        survivors, order = dict.fromkeys(self.kept, -math.inf), self._hardest_first()
        for seeds in (order[:1], order[1:3], order[3:]):
            tests = [(_without(self.kept, neuron), seeds) for neuron in survivors]
            tried = zip(survivors.items(), self.trial.similarities(tests), strict=True)
            survivors = {
                neuron: max([worst, *self._excess(values, seeds).tolist()])
                for (neuron, worst), values in tried
                if not self._lost(values, seeds)
            }
        return sorted(survivors, key=survivors.__getitem__)

    def _drop_first_of(self, order: Candidates) -> bool:
        """Drops as many of the first neurons as a search finds can go together; whether it found any."""
        candidates, low, high = self.kept, 0, len(order)
        while low < high:
            hardest = self._hardest_first()[:1]
            counts = sorted({low + math.ceil((high - low) * step / POINTS) for step in range(1, POINTS + 1)})
            rests = [[neuron for neuron in candidates if neuron not in order[:count]] for count in counts]
            tried = self.trial.similarities([(rest, hardest) for rest in rests])
            passed = [place for place, values in enumerate(tried) if not self._lost(values, hardest)]
            last = passed[-1] if passed else -1
            if passed and self._attempt(rests[last], None, hardest, tried[last]):
                low, high = counts[last], [*counts, high + 1][last + 1] - 1
            else:
                high = counts[max(last, 0)] - 1
        return low > 0

    def _layers(self) -> list[str]:
        return list(dict.fromkeys(layer for layer, _ in self.kept))[::-1]

    def _drop_in_order(self, neurons: Sequence[Neuron], layer: str) -> None:
        """Tests the neurons of a layer in order, several in a batch, guessing the outcome of each from an older test.

        A test that is expected to be lost runs on the hardest seed alone. The first wrong guess ends a batch: what was
        tested after it started from a state that did not come about, and serves the next guesses only.
        """
        queue, effects = deque(neurons), dict[Neuron, float]()
        while queue:
            order = self._hardest_first()
            if not self._lost(self.values, order):
                self._drop_repeated(queue)
            base = expected = float(self.values[order[0]])
            state, rows, plan = self.kept, 0, list[tuple[Neuron, Candidates, list[int], bool]]()
            for neuron in queue:
                guess = expected + effects.get(neuron, float("inf"))
                likely = not self._lost(torch.tensor([guess]), order[:1])
                seeds = order if likely else order[:1]
                rows += len(seeds)
                if plan and (rows > self.trial.batch_size or self.trial.whole):
                    break
                plan.append((neuron, _without(state, neuron), seeds, likely))
                if likely:
                    state, expected = plan[-1][1], guess
            results = self.trial.similarities([(rest, seeds) for _, rest, seeds, _ in plan], layer)
            for (neuron, _, _, likely), values in zip(plan, results, strict=True):
                effects[neuron] = float(values[0]) - base
                base = float(values[0]) if likely else base
            for (_, rest, seeds, likely), values in zip(plan, results, strict=True):
                queue.popleft()
                if self._attempt(rest, layer, seeds, values) != likely:
                    break

    def _drop_repeated(self, queue: deque[Neuron]) -> None:
        """Drops one entry of every neuron listed twice: the other still blocks it, so that test is passed already."""
        for neuron in list(queue):
            if self.kept.count(neuron) > 1:
                queue.remove(neuron)
                self.kept = _without(self.kept, neuron)

    def _attempt(
        self, rest: Candidates, layer: str | None = None, seeds: Sequence[int] = (), values: Tensor | None = None
    ) -> bool:
        """Goes on with ``rest`` if no seed is above what is allowed; ``values`` are known of some seeds."""
        order = self._hardest_first()
        if values is None:
            seeds = order[:1]
            values = self.trial.similarities([(rest, seeds)], layer)[0]
        if self._lost(values, seeds):
            return False
        others = [seed for seed in order if seed not in seeds]
        complete = values.new_empty(self.trial.seeds)
        complete[list(seeds)] = values
        if others:
            complete[others] = self.trial.similarities([(rest, others)], layer)[0]
        if self._lost(complete, range(self.trial.seeds)):
            return False
        self.kept, self.values = rest, complete
        return True

    def _hardest_first(self) -> list[int]:
        order: list[int] = self._excess(self.values, range(self.trial.seeds)).argsort(descending=True).tolist()
        return order

    def _lost(self, values: Tensor, seeds: Sequence[int]) -> bool:
        return bool((self._excess(values, seeds) >= 0).any())


def _without(candidates: Candidates, neuron: Neuron) -> Candidates:
    place = candidates.index(neuron)
    return candidates[:place] + candidates[place + 1 :]


def above(limit: float) -> Excess:
    """What is lost is a similarity that reaches a limit."""
    return lambda values, seeds: values - limit


def away_from(base: Tensor, part: float) -> Excess:
    """What is lost is a similarity that differs from its base, one a seed, by more than a part of it."""

    def excess(values: Tensor, seeds: Sequence[int]) -> Tensor:
        change = (values - base[list(seeds)]).abs() / base[list(seeds)].abs()
        # MS-SSIM can be exactly 0; what stays 0 has not changed.
        return change.nan_to_num(nan=0.0, posinf=float("inf")) - part

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
    """Finds the memorization neurons of one prompt.

    Args:
        model: The model, nothing blocked.
        text: Conditioning of one row.
        latents: Starting noise of S seeds, S at least 2, (S, channels, height, width).
        calibration: Statistics and threshold of the model.
        settings: The numbers of the algorithm.
        protocol: How noise differences are taken.
        batch_size: Rows in a UNet pass at most.

    Returns:
        What was found; empty where no pair of seeds is more alike than the threshold.

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
    gate_score, kept = float(matrix.max()), matrix.amax(1) > gate
    if not kept.any():
        return Localization(
            gate_score=gate_score, threshold=gate, row_passes=trial.row_passes, passed_gate=False, exhausted=False
        )
    trial.keep(kept)
    activation = {layer: values[0] for layer, values in activations(model, text).items()}
    for values in activation.values():
        require_finite("activations of value neurons", values)
    selection = initial_selection(trial, activation, calibration, tau, settings)
    limit = tau if settings.refine_threshold is None else settings.refine_threshold
    initial_score = float(selection.values.max())
    if not selection.reached and settings.when_exhausted == "nothing":
        return Localization(
            initial=as_neurons(selection.candidates),
            gate_score=gate_score,
            initial_score=initial_score,
            refined_score=1.0,  # of noise differences that nothing changes
            threshold=tau,
            row_passes=trial.row_passes,
            passed_gate=True,
            exhausted=True,
        )
    if not selection.reached:
        limit = initial_score
    # The rest of the tests is compared with a similarity then, which another batch may have rounded.
    least = limit if selection.reached else limit - trial.rounding
    excess = above(least) if settings.relative is None else away_from(selection.values, settings.relative)
    refinement = Refinement(trial, selection.candidates, selection.values, excess)
    refinement.sequential() if settings.refinement == "sequential" else refinement.bisect()
    return Localization(
        neurons=as_neurons(refinement.kept),
        initial=as_neurons(selection.candidates),
        listed=as_listed(refinement.kept) if protocol.duplicates else {},
        listed_initial=as_listed(selection.candidates) if protocol.duplicates else {},
        gate_score=gate_score,
        initial_score=initial_score,
        refined_score=float(refinement.values.max()),
        threshold=limit,
        row_passes=trial.row_passes,
        passed_gate=True,
        exhausted=not selection.reached,
    )
