"""How a run is stopped from outside."""

from __future__ import annotations

import signal
import threading


def stop_at_sigterm() -> None:
    """Has SIGTERM, which schedulers send before they take a machine back, stop this process as Ctrl-C does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
