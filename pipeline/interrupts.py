"""Ctrl-C is not lost: one that a library swallows, as in an import within a bare `except:`, is
raised again at the next edge."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came = threading.Event()


def _note(number: int, frame: FrameType | None) -> None:
    _came.set()
    raise KeyboardInterrupt


@contextmanager
def noted_interrupts() -> Iterator[None]:
    """Remember SIGINT while in this block; in a thread that may handle no signals, do nothing."""
    _came.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def raise_if_interrupted() -> None:
    """An edge: between stages, or where a stage's long work begins.

    Raises:
        KeyboardInterrupt: where Ctrl-C came and nothing ended by it.
    """
    if _came.is_set():
        raise KeyboardInterrupt
