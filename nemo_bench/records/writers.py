"""Who writes to a folder: processes, told apart on this machine and from those of others."""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def place() -> str:
    """Where numbers of processes are unique, in 8 hexadecimal digits: a machine since its start, or a container."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    names = [socket.gethostname()]
    with suppress(OSError):
        names += [boot.read_text().strip(), os.readlink(space)]
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]


def process(number: int) -> str:
    """A process of this place, in words that no later one has again; empty where it is none that runs."""
    with suppress(OSError):
        # The name in parentheses may have spaces; after it come the state and, as 20th word, the time of the start.
        words = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        return "" if words[0] in "ZX" else f"{number}:{words[19]}"
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # it is there, and somebody else's
    return str(number)
