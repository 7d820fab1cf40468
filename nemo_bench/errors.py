"""All errors that nemo_bench raises on purpose; each says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NemoBenchError(Exception):
    """Base of every error a user can cause and mend."""


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


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint for an error message: the nearest choice, then all of them.

    Args:
        word: What was given.
        choices: What would have been right.

    Returns:
        Text such as ``Did you mean 'nemo'? Choices: nemo, none, random.``
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Choices: {', '.join(choices)}."
