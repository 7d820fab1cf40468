"""All errors that nemo_bench raises on purpose; each says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2000
"""Characters of a line of a message that are shown: what it quotes may be of any length."""


def shortened(text: str, most: int = LONGEST) -> str:
    """A text with its middle left out where it has more than so many characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... [{len(text) - 2 * half:,} characters] ... {text[-half:]}"


class NemoBenchError(Exception):
    """Base of every error a user can cause and mend.

    Args:
        message: What was given, what was expected and what to do; long lines are shown without their middle.
    """

    def __init__(self, message: str = "") -> None:
        lines = "\n".join(shortened(line) for line in message.split("\n"))
        super().__init__(shortened(lines, 5 * LONGEST))


class ConfigError(NemoBenchError):
    """A setting is unknown, of the wrong type or out of range."""


class PromptError(NemoBenchError):
    """A prompt file or a reference image is missing, empty or malformed."""


class StoreError(NemoBenchError):
    """A results folder holds something that does not belong together."""


class ModelError(NemoBenchError):
    """A model can't be loaded, or does not do what is asked of it."""


class NotFiniteError(ModelError):
    """A number that a result rests on is infinite or not a number; what it belongs to is recorded as failed."""


class TrackingError(NemoBenchError):
    """A logger could not be told of results; the results themselves are complete."""


def counted(count: int, thing: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "image"), counted(1200, "prompt")
        ('1 image', '1,200 prompts')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint for an error message: the nearest choice, then all of them.

    Args:
        word: What was given.
        choices: What would have been right.

    Returns:
        Text such as ``Did you mean 'nemo'? Choices: nemo, none, random.``
    """
    choices = sorted(choices)
    # What is very long is no slip of the pen, and comparing it takes long.
    close = difflib.get_close_matches(word[:LONGEST], choices, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Choices: {', '.join(choices)}."
