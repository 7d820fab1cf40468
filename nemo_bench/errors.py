"""Errors with messages for users: the given value, the expected value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2000
"""Most characters of a line of an error message, which may quote values of any length."""


def shortened(text: str, most: int = LONGEST) -> str:
    """Leaves out the middle of a text of more than ``most`` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... [{len(text) - 2 * half:,} characters] ... {text[-half:]}"


class NemoBenchError(Exception):
    """Base of all errors that a user can cause and solve; long lines of a message lose their middle."""

    def __init__(self, message: str = "") -> None:
        lines = "\n".join(shortened(line) for line in message.split("\n"))
        super().__init__(shortened(lines, 5 * LONGEST))


class ConfigError(NemoBenchError):
    """A setting is unknown, of the wrong type or out of range."""


class PromptError(NemoBenchError):
    """A prompt file or a reference image is missing, empty or malformed."""


class StoreError(NemoBenchError):
    """Files of a results folder are damaged or contradict each other."""


class VersionError(NemoBenchError):
    """A results folder was written by a newer version of the package."""


class UnwritableError(StoreError, OSError):
    """A file of a results folder can't be written: the disk is full, read-only or gone."""


class ModelError(NemoBenchError):
    """A model can't be loaded, or does not support what was asked."""


class RankError(NemoBenchError):
    """A process of a run has died, and the others end with it."""


class LaunchError(NemoBenchError):
    """A launcher did not start workers of a run, or some of its workers failed."""


class NotFiniteError(ModelError):
    """A number behind a result is infinite or NaN; the prompt, image or search is recorded as failed."""


class TrackingError(NemoBenchError):
    """A logger failed; the results themselves are complete."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class; with the next line where the first only names a place."""
    first, *rest = str(error).strip().split("\n")
    if first.endswith(":") and rest:
        return f"{first} {rest[0]}"
    return first or type(error).__name__


def counted(count: int, thing: str) -> str:
    """A number with its noun, in the plural where needed.

    Example:
        >>> counted(1, "image"), counted(1200, "prompt")
        ('1 image', '1,200 prompts')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The nearest choice, then all choices: ``Did you mean 'nemo'? Choices: nemo, none, random.``."""
    choices = sorted(choices)
    # Comparing a very long text takes long, and it is no typing error.
    close = difflib.get_close_matches(word[:LONGEST], choices, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Choices: {', '.join(choices)}."
