"""transformers' own server (OpenAI's API) for an export folder:

    python -m pipeline.transformers_server FOLDER [options of `transformers serve`]

`transformers serve` looks a model's class up among its own classes, also where --trust-remote-code
lets it load others: here the folder's class is made known to it first. It decodes by `generate`,
one request at a time, and keeps no cache from one request to the next. Its continuous batching
pages keys and values by itself and cannot hold sparse layers' caches: it is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from pipeline.stages.export import AUTO_MAP


def main(arguments: Sequence[str]) -> None:
    """Serve until interrupted.

    Raises:
        SystemExit: without an export folder, or with continuous batching.
    """
    folder, *options = arguments or [""]
    if not (Path(folder) / "config.json").is_file():
        raise SystemExit(
            f"error: {folder!r} is no export folder; name one that stage=export has written, such "
            "as outputs/demo/main/export"
        )
    if "--continuous-batching" in options:
        raise SystemExit(
            "error: --continuous-batching pages keys and values by itself and cannot hold sparse "
            "layers' caches; leave it out"
        )
    for name in AUTO_MAP.values():
        found = get_class_from_dynamic_module(name, folder)
        setattr(transformers, found.__name__, found)
    # Brings FastAPI and uvicorn, of transformers[serving].
    from transformers.cli.transformers import app

    app(["serve", folder, "--trust-remote-code", *options])


if __name__ == "__main__":
    main(sys.argv[1:])
