"""Which backends ran the layers of what was measured, as they say themselves."""

from __future__ import annotations

import logging
import re

import kernels.dense
import kernels.sparse_attention


class BackendsSaid(logging.Handler):
    """While in its `with` block, hears which backends say that they run full or sparse layers."""

    SAYS = re.compile(r"(full|sparse) layers on \w+ run by (\w+)")
    SPEAKERS = (kernels.dense, kernels.sparse_attention)

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, set[str]] = {"full": set(), "sparse": set()}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what the message says."""
        if said := self.SAYS.search(record.getMessage()):
            kind, backend = said.groups()
            self.heard[kind].add(backend)

    def __enter__(self) -> BackendsSaid:
        for module in self.SPEAKERS:
            # Each is said once in a process, but every case wants to know.
            module._log_once.cache_clear()
            module.log.addHandler(self)
        return self

    def __exit__(self, *exception) -> None:
        for module in self.SPEAKERS:
            module.log.removeHandler(self)

    def columns(self) -> dict[str, str | None]:
        """The names; several where a step used several."""
        names = {kind: " ".join(sorted(found)) or None for kind, found in self.heard.items()}
        return {"dense_backend": names["full"], "sparse_backend": names["sparse"]}
