"""Tasks of the predict loops: a prompt, or an image of a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from nemo_bench.records.data import Prompt
from nemo_bench.records.io import digest, seed_of


def seeds_of(prompt: Prompt, purpose: str, seeds: Iterable[int]) -> list[int]:
    """Generator seeds of a prompt, from 0 to 2^63 - 1: by its id, so that order, batches and processes can't matter.

    Args:
        prompt: The prompt.
        purpose: ``"localize"`` or ``"generate"``: localizing never sees the noise that images start from.
        seeds: Numbers from 0.
    """
    return [seed_of([purpose, prompt.id, seed]) for seed in seeds]


class Task(NamedTuple):
    """A prompt to be handled as a whole, or one image of it."""

    id: str  #: Record id.
    prompt: Prompt  #: The prompt.
    seed: int = 0  #: Number of the image among those of the prompt, from 0; of a whole prompt 0.

    @classmethod
    def of_prompt(cls, prompt: Prompt) -> Task:
        """The task of a prompt; its id depends on the prompt's id alone."""
        return cls(digest([prompt.id]), prompt)

    @classmethod
    def of_image(cls, prompt: Prompt, seed: int) -> Task:
        """The task of an image; its id depends on prompt id and seed alone."""
        return cls(digest([prompt.id, seed]), prompt, seed)
