"""Tasks of the predict loops: a prompt, or an image of a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from nemo_bench.records.data import Prompt
from nemo_bench.records.io import digest, seed_of


def seeds_of(prompt: Prompt, purpose: str, seeds: Iterable[int]) -> list[int]:
    """Generator seeds of a prompt, by its id, so that order, batches and processes can't change them.

    Args:
        prompt: The prompt.
        purpose: ``"localize"`` or ``"generate"``: localizing never sees the noise that images start from.
        seeds: Numbers from 0.

    Returns:
        Seeds from 0 to 2^63 - 1.
    """
    return [seed_of([purpose, prompt.id, seed]) for seed in seeds]


class PromptTask(NamedTuple):
    """A prompt to be handled as a whole.

    Attributes:
        id: Record id.
        prompt: The prompt.
    """

    id: str
    prompt: Prompt

    @classmethod
    def from_prompt(cls, prompt: Prompt) -> PromptTask:
        """The task of a prompt; its id depends on the prompt's id alone."""
        return cls(digest([prompt.id]), prompt)


class ImageTask(NamedTuple):
    """One image of a prompt.

    Attributes:
        id: Record id.
        prompt: The prompt.
        seed: Number of the image among those of the prompt, from 0.
    """

    id: str
    prompt: Prompt
    seed: int

    @classmethod
    def from_prompt(cls, prompt: Prompt, seed: int) -> ImageTask:
        """The task of an image; its id depends on prompt id and seed alone."""
        return cls(digest([prompt.id, seed]), prompt, seed)
