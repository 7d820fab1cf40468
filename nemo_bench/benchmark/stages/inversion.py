"""Inversions of an audit: how close to random noise and tokens may be that bring a picture back (InvMM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from nemo_bench.benchmark.inversion import (
    CHECK,
    FAMILIES,
    GUIDANCES,
    NOISES,
    RATE,
    SAMPLES,
    STEPS,
    TEMPERATURE,
    Inversion,
)
from nemo_bench.benchmark.stages.audit import Search, SearchSettings, batch_of, generated, kept, unsuccessful
from nemo_bench.benchmark.stages.base import UNLOCALIZED, Stage, to_images
from nemo_bench.diffusion import fitted_picture
from nemo_bench.errors import NotFiniteError
from nemo_bench.metrics import MemorizationRate
from nemo_bench.records import schema
from nemo_bench.records.ranges import Count, Positive
from nemo_bench.records.schema import SearchRecord


@dataclass
class InversionSettings(SearchSettings):
    """How an audit inverts pictures: ``audit=inversion``. One picture takes as long as hundreds of other searches."""

    audit = "inversion"
    families = FAMILIES
    states: ClassVar[Mapping[str, str]] = {
        "prompt": "images of its prompt",
        "found": "images of the noise and tokens found",
    }

    steps: Count = STEPS  #: Steps of Adam at most.
    rate: Positive = RATE  #: Learning rate.
    samples: Count = SAMPLES  #: Draws of noise, tokens and timestep a step.
    temperature: Positive = TEMPERATURE  #: Of tokens: the lower, the closer a draw is to a single token.
    check: Count = CHECK  #: Steps between two checks.
    #: Guidance scales of a check; 1 is none.
    guidances: list[Annotated[float, Field(ge=1)]] = field(default_factory=lambda: [*GUIDANCES])
    images: Count = NOISES  #: Images of a check and guidance, all of which have to replicate the picture.


def invert(
    stage: Stage, tasks: Sequence[Search], settings: InversionSettings, rate: MemorizationRate
) -> list[SearchRecord]:
    """Inverts pictures one after the other, while the method is applied.

    Each leaves a sheet of pictures, a row for each of the states: the picture it was after, then images. A picture is
    replicated where the memorization rate says so.
    """
    return [_invert(stage, task, settings, rate) for task in tasks]


def _invert(stage: Stage, task: Search, settings: InversionSettings, rate: MemorizationRate) -> SearchRecord:
    model = stage.model
    if task.prompt.id not in stage.neurons:
        return unsuccessful(task, None, UNLOCALIZED)
    before = model.row_passes
    picture = fitted_picture(task.picture, model.image_size)
    (shown,) = to_images(picture[None])
    target = rate.space.embed([shown], shown.size, stage.device)

    def replicates(images: Tensor) -> float:
        if not images.isfinite().all():
            return 0.0
        return float(rate.score(rate.space.embed(to_images(images), shown.size, stage.device), target).mean())

    method = stage.method()
    batch = batch_of(stage, [task])
    inversion = Inversion(
        model, model.encode_images(picture[None])[0], replicates, batch.seeds[0], stage.batch_size,
        steps=settings.steps, rate=settings.rate, samples=settings.samples, temperature=settings.temperature,
        check=settings.check, guidances=settings.guidances, noises=settings.images,
    )  # fmt: skip
    try:
        # What a method makes in inference mode takes no part in gradients.
        with torch.inference_mode(False), method.apply(model, batch):
            found = inversion.run()
        rows = {"prompt": generated(stage, [task], settings.images, method, batch)[0], "found": found.images}
    except NotFiniteError as error:
        return unsuccessful(task, model.row_passes - before, str(error))
    passes = model.row_passes - before
    tensors = {"mean": found.mean, "log_variance": found.log_variance, "losses": found.losses}
    record = kept(stage, task, picture, rows, tensors, passes, settings)
    about = schema.Inversion(
        divergence=found.divergence, reached=found.reached, steps=len(found.losses), guidance=found.guidance
    )
    return record.model_copy(update={"inversion": about})
