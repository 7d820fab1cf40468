"""NeMo: switch off the value neurons found to make a prompt memorized."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from torch import Tensor

from nemo_bench.citations import HINTERSDORF
from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError
from nemo_bench.localization import PROTOCOLS, SEEDS, NemoSettings, localize
from nemo_bench.methods.base import Batch, Method
from nemo_bench.prompts import seeds_of
from nemo_bench.types import Localization, Prompt


class BlockNeurons(Method):
    """Generates with each row's own neurons multiplied by a factor.

    Args:
        factor: What the outputs of blocked neurons are multiplied by; 0 switches off.
    """

    touches = "value neurons of cross-attention"
    auditable = True

    def __init__(self, factor: float = 0.0) -> None:
        self.factor = factor

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        with model.block(batch.neurons, self.factor):
            yield batch


class NeMo(BlockNeurons):
    """Localizes by outlier activations and refinement on noise differences, then blocks what was found.

    It is for prompts that are known to be memorized. Its gate tells them badly from others: as published, 226 of the
    320 general prompts of the embedded model's calibration pass (71%, ``nemo-bench calibrate``), the selection then
    runs out, and what is blocked harms them; with ``gate="maxima"`` 43 pass.

    Args:
        protocol: ``"paper"`` or ``"reference"``, what the public scripts do; see :class:`Protocol`.
        refinement: ``"sequential"`` as published, or ``"bisect"``, faster, checked for the same criterion; see
            :class:`NemoSettings`.
        neurons: Which set is blocked: ``"refined"`` or the ``"initial"`` candidates.
        theta: First outlier threshold, in standard deviations.
        theta_step: How much it falls per round.
        theta_min: Where the search ends; never tested itself.
        outliers: Whether outliers are candidates.
        top_k: Whether the most active neurons of each layer are candidates.
        threshold: Memorization threshold in [-1, 1]; None takes the calibrated one (published: 0.428).
        refine_threshold: Threshold of the refinement in [-1, 1]; None takes that of the selection.
        relative: Refine by relative change of the similarity, at most this part, instead of by threshold.
        gate: ``"pairs"``, as published: prompts pass the gate above the memorization threshold; or ``"maxima"``: above
            one calibrated from the most alike pair of each general prompt.
        when_exhausted: What is blocked where the selection runs out without meeting its criterion: ``"block"``, as
            published, what refinement keeps of the last candidates; or ``"nothing"``.
        factor: What the outputs of blocked neurons are multiplied by.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "NeMo"
    summary = "value neurons with outlier activations, refined on noise differences, switched off"
    sourcing = "paper and public code"
    citation = HINTERSDORF
    needs_calibration = True

    def __init__(
        self,
        protocol: Literal["paper", "reference"] = "paper",
        refinement: Literal["sequential", "bisect"] = "sequential",
        neurons: Literal["refined", "initial"] = "refined",
        theta: float = 5.0,
        theta_step: float = 0.25,
        theta_min: float = 1.0,
        outliers: bool = True,
        top_k: bool = True,
        threshold: float | None = None,
        refine_threshold: float | None = None,
        relative: float | None = None,
        gate: Literal["pairs", "maxima"] = "pairs",
        when_exhausted: Literal["block", "nothing"] = "block",
        factor: float = 0.0,
    ) -> None:
        super().__init__(factor)
        if not (math.inf > theta > theta_min >= 0 and theta_step > 0):
            msg = f"nemo needs theta > theta_min >= 0 and theta_step > 0, given {theta}, {theta_min}, {theta_step}"
            raise ConfigError(msg)
        for name, value in {"threshold": threshold, "refine_threshold": refine_threshold}.items():
            if value is not None and not -1 <= value <= 1:
                raise ConfigError(f"nemo needs a {name} from -1 to 1, a similarity, given {value}")
        if relative is not None and not 0 < relative < math.inf:
            raise ConfigError(f"nemo needs relative above 0, a part of a similarity, given {relative}")
        if not (outliers or top_k):
            raise ConfigError("nemo needs candidates: set outliers=true, top_k=true or both")
        self.protocol, self.neurons, self.threshold = PROTOCOLS[protocol], neurons, threshold
        self.settings = NemoSettings(
            theta, theta_step, theta_min, factor, threshold, outliers, top_k, refine_threshold, relative, refinement,
            gate, when_exhausted,
        )  # fmt: skip

    @property
    def calibrates_threshold(self) -> bool:
        """See :attr:`Method.calibrates_threshold`."""
        return self.threshold is None or self.settings.gate == "maxima"

    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        """See :meth:`Method.localize`.

        Raises:
            ConfigError: The model has not been calibrated.
        """
        if self.calibration is None:
            raise ConfigError("NeMo needs to know general prompts: call calibrate(model, prompts), or set calibration")
        if latents is None:
            latents = self.protocol.latents(model, seeds_of(prompt, "localize", range(SEEDS)))
        text = model.encode([prompt.text])
        result = localize(model, text, latents, self.calibration, self.settings, self.protocol, self.batch_size)
        is_left_alone = bool(result.exhausted) and self.settings.when_exhausted == "nothing"
        if self.neurons == "initial" and not is_left_alone:
            return replace(result, neurons=result.initial, refined_score=result.initial_score)
        return result
