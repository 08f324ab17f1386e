"""Resolve the requirements against the public torch for each supported Python; install nothing.

What pip finds on one machine proves little: a CPU wheel of torch, or a constraint, in pip's
configuration hides a conflict that every plain index has. uv reads none of that configuration and
resolves for a Python that is not installed; it gets from pip only the index and the way to it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12")
PLATFORM = "x86_64-manylinux_2_28"
# pip's settings that uv takes from the environment, under its names for them.
FROM_PIP = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY"}
# uv's own settings that change no result.
KEPT = {"UV_CACHE_DIR", "UV_HTTP_RETRIES", "UV_HTTP_TIMEOUT"}
# Packages that README and docs name, and those that the product asks for where it needs them.
NAMED = r"pip install ([A-Za-z][\w.-]*(?:\[[\w,]+\])?(?:==[\w.]+)?)"
ASKED_FOR = r'^PACKAGE = "([\w.-]+==[\w.]+)"'


def environment() -> dict[str, str]:
    """This process's environment with pip's index in uv's variables, and no other setting of uv."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("UV_") or name in KEPT
    }
    for key, name in FROM_PIP.items():
        # The later one wins, as in pip.
        for section in ("global", "install", ":env:"):
            if f"{section}.{key}" in settings:
                kept[name] = settings[f"{section}.{key}"].strip("'\"")
    return {**kept, "UV_PYTHON_DOWNLOADS": "never", "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}


def resolve(python: str, files: list[Path], extra: list[str], *options: str) -> tuple[str, str]:
    """(the resolved packages, one a line, and uv's error; one of them is empty)."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config"]
    command += ["--python", sys.executable, "--python-version", python, "--python-platform"]
    command += [PLATFORM, "--no-header", "--no-annotate", *options, *map(str, files), "-"]
    done = subprocess.run(
        command, input="\n".join(extra), env=environment(), capture_output=True, text=True
    )
    return (done.stdout, "") if done.returncode == 0 else ("", done.stderr.strip())


def unreachable() -> str | None:
    """Why no package index answers; None where one does."""
    _, error = resolve(PYTHONS[0], [], ["setuptools"], "--no-deps", "--no-cache")
    return error if "Failed to fetch" in error else None


def optional_packages(root: Path) -> list[str]:
    """What README and docs tell the reader to install, and what the product asks for."""
    pages = [root / "README.md", *root.glob("docs/*.md")]
    found = {name for page in pages for name in re.findall(NAMED, page.read_text())}
    for path in (root / "pipeline").rglob("*.py"):
        found.update(re.findall(ASKED_FOR, path.read_text(), re.M))
    return sorted(found)


def check(root: Path) -> list[str]:
    """Print what each list resolves to; returns the errors.

    A set of packages that resolves together resolves in each of its parts too.
    """
    lists = {"requirements.txt": ([root / "requirements.txt"], [])}
    every = sorted(root.glob("requirements*.txt"))
    optional = optional_packages(root)
    lists[" + ".join([*(path.name for path in every), *optional])] = (every, optional)
    pinned = re.search(r"^torch==(\S+)", (root / "requirements.txt").read_text(), re.M)[1]
    errors = []
    for name, (files, extra) in lists.items():
        for python in PYTHONS:
            # "===" excludes local builds such as +cpu.
            packages, error = resolve(python, files, [*extra, f"torch==={pinned}"])
            versions = dict(line.split("==") for line in packages.split() if "==" in line)
            if not error and versions["torch"] != pinned:
                error = (
                    f"the index has torch {versions['torch']}, must be {pinned}: set PIP_INDEX_URL"
                )
            if error:
                errors.append(f"{name}, Python {python}: {error}")
                continue
            told = " ".join(f"{key} {versions[key]}" for key in ("torch", "triton"))
            print(f"check-install: {name}, Python {python}: {len(versions)} packages, {told}")
    return errors


def main() -> int:
    error = unreachable()
    if error:
        print(f"check-install: NOT CHECKED, no package index is reachable: {error}")
        return 0
    errors = check(ROOT)
    for error in errors:
        print(f"check-install: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
