"""The base class of all metrics: a score, and a declaration of its fields, space, range and direction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from nemo_bench.metrics.spaces import ImageSpace, PixelDistance
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Checked

Family = Literal["memorization", "change", "alignment", "diversity", "quality", "localization"]
Per = Literal["image", "prompt", "set"]
Role = Literal[
    "",
    "training_similarity",
    "nearest_training_similarity",
    "memorization_rate",
    "memorization_score",
    "training_loss",
    "neuron_count",
    "precision",
    "recall",
    "f1",
    "recall_at_true_number",
    "average_precision",
]

FIELDS = frozenset({
    "images", "references", "pool", "unmitigated", "text", "memorization", "loss", "localization", "ranking", "truth",
    "real", "prompt",
})  # fmt: skip
"""Fields that a metric can need; see :class:`BenchMetric`."""


class BenchMetric(Checked, ABC):
    """Scores the images of a prompt, or of a whole set of prompts.

    Fields hold pictures as the metric's space embeds them, (N, 3, H, W) in [0, 1] for pixels and (N, D) for networks:

    - ``images``: the S generated images of the prompt, or all images of a set.
    - ``references``: the training images of the prompt.
    - ``pool``: the training images of all prompts.
    - ``unmitigated``: the S images of the same seeds without mitigation.
    - ``real``: the real pictures that a set is compared with.

    Other fields are ``prompt``, the :class:`~nemo_bench.records.data.Prompt`; ``text``, its original text in the space,
    (D,); ``memorization``, the memorization score of the prompt, and ``loss``, the training loss of its pictures,
    floats; ``localization``, its :class:`~nemo_bench.records.data.Neurons`; ``ranking``, where a localizer ranked all
    neurons, the places of all by layer, 0 for the most responsible; and ``truth``, the neurons that are known to
    memorize it.
    """

    title: str  #: Name in tables.
    description: str  #: One sentence with the protocol.
    citation: str = ""  #: Source.
    family: ClassVar[Family]  #: Subject of the metric.
    per: ClassVar[Per] = "image"  #: Whether a score belongs to an image, a prompt or a whole set of images.
    by_image: ClassVar[bool] = False  #: Whether nothing else of its prompt matters: prompts can be scored together.
    role: ClassVar[Role] = ""  #: Part that the metric plays in reports, whatever its key in the settings.
    needs: ClassVar[frozenset[str]]  #: Fields that :meth:`score` takes. A prompt that lacks one gets no score.
    lower: float | None = None  #: Lowest possible score, or None.
    upper: float | None = None  #: Highest possible score, or None.
    higher_is_better: bool | None = None  #: None where neither direction is better.

    def __init__(self, space: ImageSpace | None = None) -> None:
        self.space = space or PixelDistance()

    def check(self) -> None:
        """Raises NemoBenchError if weights, pictures or a library are missing; the message says how to get them."""
        self.space.check()

    def check_prompts(self, prompts: Sequence[Prompt], size: tuple[int, int] | None) -> None:
        """Raises NemoBenchError, before weights load, where files that belong to prompts are not as they should be.

        ``size`` is width and height of generated images, None where that is not known yet.
        """

    def fingerprint(self) -> Mapping[str, Any]:
        """Digests that replace paths and spaces in the identity of the metric."""
        return {"space": self.space.fingerprint()}

    def describe(self) -> dict[str, Any]:
        """The declarations above, and the name of the class as ``measure``."""
        fields = ("title", "description", "citation", "higher_is_better", "lower", "upper", "family", "per", "role")
        return {"measure": type(self).__name__, **{field: getattr(self, field) for field in fields}}

    @abstractmethod
    def score(self, *args: Any, **fields: Any) -> Tensor:
        """Scores one prompt, or one set of images; overrides take the fields in :attr:`needs`, by name.

        Returns:
            (S,) scores of S images, or (1,) of the prompt or set; empty where there is no score.
        """
