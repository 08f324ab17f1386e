"""The log of a run: lines on the terminal, and the same lines in a file of the run's folder."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger("longgen")

NAME = "console.log"


class TerminalHandler(logging.StreamHandler):
    """Writes to sys.stdout or stderr as it is at that moment: rich replaces it to show a bar."""

    def __init__(self, stream: str = "stdout") -> None:
        """`stream`: stdout or stderr."""
        logging.Handler.__init__(self)
        stream_now = getattr(sys, stream)
        if hasattr(stream_now, "reconfigure"):
            # a file's name need not be UTF-8
            stream_now.reconfigure(errors="backslashreplace")
        self._stream = stream
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    @property
    def stream(self):
        """Where lines go now."""
        return getattr(sys, self._stream)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Go on in silence where nobody reads any more, as under `| head`; the file has it all."""
        if isinstance(sys.exception(), BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        else:
            super().handleError(record)


def log_to_terminal(stream: str) -> None:
    """Show what is logged on `stream`, stdout or stderr, unless the log is shown already."""
    if not log.handlers:
        log.addHandler(TerminalHandler(stream))
        log.setLevel(logging.INFO)
        log.propagate = False


class _FileHandler(logging.FileHandler):
    """Goes on without a line that cannot be written: a full disk stops the stage, not its log."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass

    def close(self) -> None:
        # It writes what is buffered once more.
        with suppress(OSError):
            super().close()


@contextmanager
def console_log(path: Path) -> Iterator[None]:
    """Append what is logged to `path` as well, and the traceback of an error that leaves.

    Several processes may append to one file: each line is one write.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    handler = _FileHandler(path, delay=True, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    # Of several processes, the terminal's handler knows who speaks.
    handler.filters = log.handlers[0].filters
    log.addHandler(handler)
    try:
        yield
    except Exception:
        handler.handle(logging.makeLogRecord({"msg": traceback.format_exc().rstrip()}))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
