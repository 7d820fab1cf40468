"""Environment and output streams of a command line process, set before any library is imported."""

from __future__ import annotations

import codecs
import io
import os
import sys

_DEFAULTS = {  # no noise in the terminal
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_ASCII = {
    "↓": "v", "↑": "^", "→": "->", "←": "<-", "–": "-", "—": "-", "−": "-", "·": "-", "•": "*", "±": "+-", "×": "x",
    "≥": ">=", "≤": "<=", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"', "█": "#", "━": "-", "╸": "-", "╺": "-",
}  # fmt: skip
"""Characters of tables, bars and messages, in ASCII."""


def prepare_process() -> None:
    """Sets environment variables that libraries read on import, and makes output of a command safe for any encoding."""
    # A notebook's kernel passes on its own backend, without which matplotlib, and so torchmetrics, can't be imported.
    os.environ["MPLBACKEND"] = "agg"
    # A parent process may have left the address of a wandb service of another version, or of one that ends before.
    os.environ.pop("WANDB_SERVICE", None)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    codecs.register_error("nemo_bench.ascii", _to_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="nemo_bench.ascii")


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that can't be encoded by similar ones of ASCII, or by their code points."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end]
    plain = (_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in wanted)
    return "".join(plain), error.end
