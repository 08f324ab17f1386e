"""Packages of the Debian and Python registries and data sets of the Hugging Face hub, downloaded
and unpacked; their code never runs."""

from __future__ import annotations

import hashlib
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import Any

from pipeline.manifest import StageError

DEBIAN = re.compile(r"debian:([a-z0-9][a-z0-9+.-]+)(=[A-Za-z0-9.+~:-]+)?")
PYPI = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==[A-Za-z0-9][A-Za-z0-9.+!_-]*")
HUB = re.compile(r"hub:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@([A-Za-z0-9][\w./-]*)")
SPECS = '"debian:NAME", "debian:NAME=VERSION", "pypi:NAME==VERSION" or "hub:OWNER/NAME@REVISION"'
TIMEOUT_SECONDS = 3600
OTHERWISE = "or choose a source on this machine (a path without a package)"


def check_spec(spec: str) -> None:
    """Refuse what is none of SPECS."""
    if not any(kind.fullmatch(spec) for kind in (DEBIAN, PYPI, HUB)):
        raise StageError(
            f"package {spec!r}: must be {SPECS}; set the data source's package or model.source"
        )


def folder_name(spec: str) -> str:
    """The folder under packages/ in which a package is unpacked: its name without the version."""
    check_spec(spec)
    data_set = HUB.fullmatch(spec)
    if data_set:
        return "hub--" + data_set.group(1).replace("/", "--")
    return (DEBIAN.fullmatch(spec) or PYPI.fullmatch(spec)).group(1)


def download_data_set(spec: str, out: Path, globs: list[str]) -> dict[str, Any]:
    """Download the files of a data set that match one of `globs`; what is there is not fetched
    again.

    Returns:
        {"revision", "files", "bytes"}: the commit, and what lies in `out`.

    Raises:
        StageError: without a network, on an unknown data set, or where no file matches.
    """
    from huggingface_hub import HfApi, snapshot_download

    check_spec(spec)
    name, revision = HUB.fullmatch(spec).groups()
    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
        snapshot_download(
            name, repo_type="dataset", revision=commit, local_dir=out, allow_patterns=globs
        )
    # The hub's client raises errors of several libraries: whichever it is, the remedy is the same.
    except Exception as error:
        told = str(error).splitlines()[0] if str(error) else ""
        raise StageError(
            f"package {spec!r}: the hub did not give it ({type(error).__name__}: {told}); check "
            "its name and revision, run stage=fetch where there is a network (for gated data sets "
            f"after `hf auth login`), {OTHERWISE}"
        ) from error
    files = [path for path in out.rglob("*") if path.is_file() and ".cache" not in path.parts]
    if not files:
        raise StageError(
            f"package {spec!r}: no file matches {', '.join(globs)}; set the source's glob to match "
            f"files of the data set, {OTHERWISE}"
        )
    size = sum(path.stat().st_size for path in files)
    return {"revision": commit, "files": len(files), "bytes": size}


def unpack(spec: str, out: Path) -> dict[str, Any]:
    """Download a package and unpack it into the new folder `out`.

    Archives under usr/src of a Debian package (its source tarballs) are unpacked beside
    themselves and removed.

    Returns:
        {"file", "bytes", "sha256"} of what was downloaded.

    Raises:
        StageError: without a network, on an unknown package, without apt or pip, or on an archive
            that is damaged or reaches outside its folder.
    """
    out.mkdir(parents=True)
    with temporary_folder(out.parent) as temporary:
        archive = download(spec, temporary)
        if archive.suffix == ".deb":
            _command(["dpkg-deb", "-x", str(archive), str(out)], temporary, spec, "unpack")
        else:
            unzip(archive, out)
        with archive.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        counts = {"file": archive.name, "bytes": archive.stat().st_size, "sha256": sha256}
    for tarball in sorted((out / "usr" / "src").glob("*.tar.*")):
        untar(tarball, tarball.parent)
        tarball.unlink()
    return counts


def download(spec: str, folder: Path) -> Path:
    """Download a package's archive (.deb or wheel) into `folder`; returns its path."""
    check_spec(spec)
    name = spec.split(":", 1)[1]
    if spec.startswith("debian:"):
        command, suffix = ["apt-get", "download", name], ".deb"
    else:
        # Wheels only: pip would run a source package's setup.py to learn its metadata.
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
        command, suffix = [sys.executable, "-m", "pip", "download", *options, name], ".whl"
    before = set(folder.iterdir())
    _command(command, folder, spec, "download")
    found = [path for path in folder.iterdir() if path not in before and path.suffix == suffix]
    if len(found) != 1:
        raise StageError(
            f"package {spec!r}: `{' '.join(command)}` left {len(found)} {suffix} files; must be "
            f"one; check the package's name, {OTHERWISE}"
        )
    return found[0]


def unzip(archive: Path, out: Path, suffix: str = "") -> list[Path]:
    """Unpack the files of a zip archive whose names end with `suffix`; returns their paths."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [m for m in opened.infolist() if not m.is_dir()]
            members = [m for m in members if m.filename.endswith(suffix)]
            for member in members:
                parts = PurePosixPath(member.filename)
                if parts.is_absolute() or ".." in parts.parts:
                    raise zipfile.BadZipFile(f"{member.filename} reaches outside")
            return [Path(opened.extract(member, out)) for member in members]
    except zipfile.BadZipFile as error:
        raise StageError(
            f"{archive.name}: damaged or unsafe archive ({shorten(str(error), 200)}); run "
            f"stage=fetch again, {OTHERWISE}"
        ) from error


def untar(archive: Path, out: Path) -> None:
    """Unpack a compressed tar archive; links and names that reach outside `out` are refused."""
    try:
        with tarfile.open(archive) as opened:
            opened.extractall(out, filter="data")
    except (tarfile.TarError, EOFError, lzma.LZMAError) as error:
        raise StageError(
            f"{archive.name}: damaged or unsafe archive ({shorten(str(error), 200)}); run "
            f"stage=fetch again, {OTHERWISE}"
        ) from error


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside what is being made, on the same disk, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=".download-") as name:
        yield Path(name)


def _command(command: list[str], folder: Path, spec: str, verb: str) -> None:
    """Run a command in `folder`; its last lines are told where it fails."""
    remedy = {
        "apt-get": "run `apt-get update` where there is a network",
        "dpkg-deb": "run stage=fetch again",
    }.get(command[0], "check the version, and run stage=fetch where there is a network")
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_SECONDS,
        )
    except FileNotFoundError as error:
        raise StageError(
            f"package {spec!r}: {command[0]} is not installed here; run stage=fetch on a Debian or "
            f"Ubuntu machine, {OTHERWISE}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise StageError(
            f"package {spec!r}: {verb} took longer than {TIMEOUT_SECONDS} s; {remedy}, {OTHERWISE}"
        ) from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if line.startswith(("ERROR", "E:"))] or lines[-2:]
        told = " | ".join(shorten(line, 240) for line in errors)
        raise StageError(f"package {spec!r}: cannot {verb}: {told}; {remedy}, {OTHERWISE}")
