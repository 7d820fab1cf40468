"""A guard against memorization while a diffusion model is fine-tuned: a callback for any Lightning training.

Example:
    >>> monitor = MemorizationMonitor(pipeline, captions, general, every=500)
    >>> Trainer(callbacks=[monitor]).fit(module)
    >>> [(flag.step, flag.caption) for flag in monitor.flags]
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import lightning as L
import numpy as np
import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.loggers import WandbLogger
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from nemo_bench.detectors import Detector, NoiseDifference, watch
from nemo_bench.diffusion import Diffusion, Similarity
from nemo_bench.errors import ConfigError
from nemo_bench.records.data import Prompt
from nemo_bench.records.ranges import Checked, Count

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Flag:
    """A caption that scored above the threshold."""

    step: int  #: Optimizer steps made before.
    caption: str
    detector: str
    score: float
    threshold: float


class MemorizationMonitor(Checked, L.Callback):
    """Scores training captions with detectors while a model is trained, and flags those that it memorizes.

    Before the first step and then every so many steps, a sample of the training captions and general captions, which
    the training does not see, are scored by the model as it is. A caption is flagged where its score is more than
    ``deviations`` standard deviations above the mean of the general ones, which are scored at the same steps because
    scores change with the model. Each check logs, for every detector, ``<name>/<detector>/`` mean, max,
    threshold, and flagged, the share of the captions above the threshold; Weights & Biases gets a table of the flags.

    The training is not changed: weights, modes, gradients, devices and random numbers are as before, though a check
    needs room for the whole pipeline on the device of the training. Ranks share the captions; networks that are sharded
    over ranks can't be checked.

    Args:
        pipeline: A diffusers pipeline that shares the networks that are trained.
        captions: Training captions.
        general: Captions of the same kind that the training does not see, 16 or more for a steady threshold.
        detectors: By name; by default the noise difference of four seeds, one pass of the network for each.
        every: Optimizer steps between two checks.
        sample: Captions that a check draws, the same for a step and seed; None for all.
        deviations: Standard deviations of the general scores between their mean and the threshold.
        stop_at: Share of flagged captions, of any detector, at which the training stops; None to go on.
        steps: Sampling steps, for detectors that need some.
        guidance: Scale of guidance, for the same.
        similarity: Settings of the similarity of noise differences.
        batch_size: Images in a pass at most.
        seed: Of the samples.
        name: Begins the names of what is logged; monitors of one training need different ones.

    Attributes:
        flags: All flags so far, kept in checkpoints.

    Raises:
        ConfigError: An argument is out of its range, there are fewer than two general captions or no others, or the
            lists have captions in common.
        NemoBenchError: The pipeline or its guidance does not suit a detector; see :class:`~nemo_bench.Diffusion`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        captions: Sequence[str],
        general: Sequence[str],
        detectors: Mapping[str, Detector] | None = None,
        *,
        every: Count = 500,
        sample: Count | None = 64,
        deviations: Annotated[float, Field(ge=0)] = 3.0,
        stop_at: Annotated[float, Field(gt=0, le=1)] | None = None,
        steps: Count = 20,
        guidance: float = 7.0,
        similarity: Similarity | None = None,
        batch_size: Count = 32,
        seed: int = 0,
        name: str = "memorization",
    ) -> None:
        if not captions or len(general) < 2:
            counts = f"given {len(captions)} and {len(general)}"
            raise ConfigError(f"the monitor needs training captions and two or more general captions; {counts}")
        if common := set(captions) & set(general):
            raise ConfigError(
                f"'{min(common)}' is a training caption and a general one; general captions must not be trained on"
            )
        self.detectors = dict(detectors or {"noise_difference": NoiseDifference(seeds=4)})
        self.pipeline, self.captions, self.general = pipeline, list(dict.fromkeys(captions)), list(general)
        self.every, self.sample, self.deviations, self.stop_at = every, sample, deviations, stop_at
        self.batch_size, self.seed, self.name = batch_size, seed, name
        self.flags: list[Flag] = []
        self._checked = -1
        with _untouched(pipeline):
            self.model = Diffusion(pipeline, steps=steps, guidance=guidance, similarity=similarity)
        for detector in self.detectors.values():
            detector.check(type(pipeline).__name__, guidance)
            detector.check_model(self.model)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        # Steps are counted over all optimizers, so some numbers may be left out.
        if trainer.global_step // self.every > self._checked // self.every:
            self._check(trainer, pl_module)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"flags": json.dumps(list(map(asdict, self.flags))), "checked": self._checked}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.flags = [Flag(**flag) for flag in json.loads(state_dict["flags"])]
        self._checked = state_dict["checked"]

    def _check(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == self._checked:  # batches whose gradients are accumulated share a step, and so does a resumed fit
            return
        self._checked = step
        captions = self._sample(step)
        with _untouched(self.pipeline):
            self.model.to(module.device).eval().forget()
            scores = self._scores(trainer, [*captions, *self.general])
        shares: list[float] = []
        values: dict[str, float] = {}
        for name, all_scores in scores.items():
            own, others = all_scores[: len(captions)], all_scores[len(captions) :]
            counts = [int(np.isfinite(part).sum()) for part in (own, others)]
            if counts[0] == 0 or counts[1] < 2:
                log.warning(
                    "step %d: %s can't tell: of %d captions %d have a finite score, of %d general ones %d",
                    *(step, name, len(own), counts[0], len(others), counts[1]),
                )
                continue
            threshold = float(np.nanmean(others) + self.deviations * np.nanstd(others))
            above = own > threshold
            shares.append(float(above.sum() / counts[0]))
            figures = (float(np.nanmean(own)), float(np.nanmax(own)), threshold, shares[-1])
            keys = ("mean", "max", "threshold", "flagged")
            values |= {f"{self.name}/{name}/{key}": value for key, value in zip(keys, figures, strict=True)}
            for place in np.flatnonzero(above):
                self.flags.append(Flag(step, captions[place], name, float(own[place]), threshold))
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
            if isinstance(logger, WandbLogger) and self.flags:
                rows = [list(asdict(flag).values()) for flag in self.flags]
                logger.log_table(f"{self.name}/flags", columns=list(asdict(self.flags[0])), data=rows, step=step)
        if now := {flag.caption for flag in self.flags if flag.step == step}:
            log.warning("step %d: %d of %d captions look memorized: %s", step, len(now), len(captions), _few(now))
        if self.stop_at is not None and max(shares, default=0.0) >= self.stop_at:
            log.warning("step %d: the training stops, since the share is %.2f or more", step, self.stop_at)
            trainer.should_stop = True

    def _sample(self, step: int) -> list[str]:
        if self.sample is None or self.sample >= len(self.captions):
            return self.captions
        places = np.random.default_rng([self.seed, step]).choice(len(self.captions), self.sample, replace=False)
        return [self.captions[place] for place in sorted(places)]

    def _scores(self, trainer: L.Trainer, texts: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Scores by detector, nan where one failed; each rank takes a part of the texts."""
        own = texts[trainer.global_rank :: trainer.world_size]
        prompts = [Prompt(text, text) for text in own]  # none where there are more ranks than texts
        found = watch(self.model, self.detectors, prompts, self.batch_size)[0] if prompts else {}
        part = {name: dict(zip(own, (each.score for each in all_of), strict=True)) for name, all_of in found.items()}
        parts = [part] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, part)
        return {
            name: np.array([parts[place % trainer.world_size][name][text] for place, text in enumerate(texts)])
            for name in self.detectors
        }


@contextmanager
def _untouched(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Leaves devices, modes, gradients and random numbers of a training as they were."""
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    devices = [(network, next(network.parameters()).device) for network in networks]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    gradients = [(weight, weight.requires_grad) for network in networks for weight in network.parameters()]
    own = {device.index for _, device in devices if device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(own)):
            yield
    finally:
        for network, device in devices:
            network.to(device)
        for module, training in modes:
            module.training = training
        for weight, requires_grad in gradients:
            weight.requires_grad_(requires_grad)


def _few(captions: set[str]) -> str:
    shown = [f"'{caption}'" for caption in sorted(captions)[:3]]
    return ", ".join(shown) + (f" and {len(captions) - 3} more" if len(captions) > 3 else "")
