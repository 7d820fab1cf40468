"""What all localizers share: scores of all value neurons of a model for one prompt, and a set of the highest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.localization.calibration import Calibration
from nemo_bench.localization.protocol import PAPER, Protocol
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.io import seed_of
from nemo_bench.records.ranges import Checked, Count, Share

Scores = Mapping[str, NDArray[np.float32]]
"""How responsible every neuron is, (neurons,), by layer; larger is more."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run gives a localizer for one prompt."""

    latents: Tensor  #: Starting noise of S seeds, (S, channels, height, width), which no image starts from.
    calibration: Calibration | None = None  #: For localizers with ``needs_calibration``.
    batch_size: int = 32  #: Rows in a UNet pass at most; changes results by rounding only.
    count: int | None = None  #: How many neurons memorize it, where known and with ``uses_count``.


class Localizer(Checked, ABC):
    """Says which value neurons memorize a prompt.

    Constructors raise a ConfigError for an argument outside the range in its annotation.
    """

    title: ClassVar[str]  #: Name in tables.
    summary: ClassVar[str]  #: One line for ``nemo-bench ls``.
    citation: ClassVar[str] = ""  #: BibTeX of the source, empty for a control of our own.
    sourcing: ClassVar[str] = ""  #: Parts of the source that we could read, and what is an adaptation.
    needs_calibration: ClassVar[bool] = False  #: Whether it compares with general prompts.
    needs: ClassVar[frozenset[Literal["gradients"]]] = frozenset()  #: Requirements on the model.
    makes_passes: ClassVar[bool] = False  #: Whether it makes UNet passes.
    memorization_threshold: float | None = None  #: A threshold of its own, or None for the calibrated one.
    calibrates_threshold: bool = False  #: Whether the calibration must include a threshold.
    noise_protocol: Protocol = PAPER  #: How it takes noise differences.

    def least_passes(self, widths: Mapping[str, int]) -> int:
        """UNet passes of one sample that a prompt takes at least, as far as settings tell.

        Args:
            widths: Number of neurons by layer; empty where it is not known yet.
        """
        return 0

    def lacks(self, prompt: Prompt) -> str:
        """What a prompt lacks that localizing needs, with what to do; empty where it lacks nothing."""
        return ""

    @property
    def uses_count(self) -> bool:
        """Whether it takes the number of known neurons, so that its result depends on them."""
        return False

    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        """Content behind settings, such as the digest of a file, for the hash of a cell; read before weights load.

        Raises:
            NemoBenchError: A file can't be read.
        """
        return {}

    def setup(self, model: Diffusion, batch_size: int) -> None:  # most measure nothing
        """Measures what all prompts share; called once, before the first prompt."""

    @abstractmethod
    def localize(self, model: Diffusion, prompt: Prompt, inputs: Inputs) -> Localization:
        """Localizes on a model with nothing blocked.

        Returns:
            The neurons, the UNet passes of one sample that they took, and scores of all neurons.

        Raises:
            NotFiniteError: A number is not finite, or the prompt lacks what the localizer needs.
        """


@dataclass(eq=False, kw_only=True)
class Ranker(Localizer):
    """A localizer that scores neurons and leaves open how many of the highest memorize a prompt."""

    #: Size of the set for prompts of which it is not known, as a part of each layer, at least one neuron of each.
    share: Share = 0.02
    #: The same as a number of neurons over all layers, then for all prompts; None for the share.
    number: Count | None = None

    @property
    @override
    def uses_count(self) -> bool:
        return self.number is None

    @abstractmethod
    def score(self, model: Diffusion, prompt: Prompt, inputs: Inputs) -> Mapping[str, Tensor]:
        """Scores of all neurons, (neurons,), by layer in network order; larger is more responsible."""

    @override
    def localize(self, model: Diffusion, prompt: Prompt, inputs: Inputs) -> Localization:
        before = model.row_passes
        scores = as_scores(self.score(model, prompt, inputs))
        neurons = self._highest(ranks(scores, prompt.id), inputs.count)
        return Localization(neurons, row_passes=model.row_passes - before, scores=scores)

    def _highest(self, places: Mapping[str, NDArray[np.int64]], known: int | None) -> Neurons:
        count = known if self.number is None else self.number
        if count is not None:
            return Neurons({layer: np.flatnonzero(own < count).tolist() for layer, own in places.items()})
        chosen = {}
        for layer, own in places.items():
            size = max(1, round(len(own) * self.share))
            chosen[layer] = own.argsort()[:size].tolist()
        return Neurons(chosen)


def as_scores(scores: Mapping[str, Tensor]) -> Scores:
    """Scores as arrays; raises NotFiniteError if one is infinite or nan."""
    require_finite("scores of neurons", torch.cat([values.flatten().cpu() for values in scores.values()]))
    return {layer: values.detach().float().cpu().numpy() for layer, values in scores.items()}


def ranks(scores: Scores, prompt: str) -> dict[str, NDArray[np.int64]]:
    """Places of neurons among those of all layers, (neurons,), by layer; 0 for the highest score.

    Equal scores are in an order that is drawn by the id of the prompt, so that none is preferred for its layer.
    """
    layers = sorted(scores)  # a file of scores has them in another order
    values = np.concatenate([scores[layer] for layer in layers])
    drawn = np.random.default_rng(seed_of(["ties", prompt])).permutation(len(values))
    places = np.empty(len(values), dtype=np.int64)
    places[drawn[np.argsort(-values[drawn], kind="stable")]] = np.arange(len(values))
    ends = np.cumsum([len(scores[layer]) for layer in layers])
    return dict(zip(layers, np.split(places, ends[:-1]), strict=True))
