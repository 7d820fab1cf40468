"""A process of the command line made ready, before anything but the standard library is imported."""

from __future__ import annotations

import codecs
import io
import os
import sys

_SET = {
    # Figures are drawn into files. Kernels of notebooks name a back end to what they start that may not be installed
    # there, and matplotlib, which torchmetrics imports as well, then refuses to be imported.
    "MPLBACKEND": "agg",
}
_UNLESS_SET = {
    # Neither library has anything to fetch here that a user asked for; an advice line per run is noise.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_UNSET = (
    # The service of the wandb of who started this: of another version, or gone before this ends.
    "WANDB_SERVICE",
)
_PLAIN = {
    "↓": "v", "↑": "^", "→": "->", "←": "<-", "–": "-", "—": "-", "−": "-", "·": "-", "•": "*", "±": "+-", "×": "x",
    "≥": ">=", "≤": "<=", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"', "█": "#", "━": "-", "╸": "-", "╺": "-",
}  # fmt: skip
"""Characters that tables, bars and messages have, as ASCII."""


def make_ready() -> None:
    """Sets what libraries read of the environment while they are imported, and lets output be written in any encoding.

    For a process that is the command line's own; who uses the package as a library keeps environment and streams.
    """
    os.environ.update(_SET)
    for name, value in _UNLESS_SET.items():
        os.environ.setdefault(name, value)
    for name in _UNSET:
        os.environ.pop(name, None)
    codecs.register_error("nemo_bench.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="nemo_bench.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What can't be written is, in ASCII: a look-alike, or its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end]
    plain = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in wanted)
    return "".join(plain), error.end
