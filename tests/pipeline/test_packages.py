import io
import lzma
import os
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline import packages
from pipeline.manifest import StageError

DEB = "debian:some-docs"
WHEEL = "pypi:some-model==1.0"


def make_tar(path: Path, files: dict[str, bytes], link: tuple[str, str] | None = None) -> None:
    with tarfile.open(path, "w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = tarfile.SYMTYPE, link[1]
            archive.addfile(member)


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A folder that stands in for the registries: every download gives its files."""
    folder = tmp_path / "registry"
    folder.mkdir()

    def command(words, cwd, spec, verb):
        if verb == "download":
            for path in folder.iterdir():
                (cwd / path.name).write_bytes(path.read_bytes())
        else:
            # What dpkg-deb -x does; here a .deb is a plain tar archive.
            packages.untar(Path(words[2]), Path(words[3]))

    monkeypatch.setattr(packages, "_command", command)
    return folder


def test_wheel_is_unzipped_whole(tmp_path, registry):
    with zipfile.ZipFile(registry / "some_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some_model/data/a.txt", "text")
        archive.writestr("some_model/__init__.py", "raise SystemExit")
    counts = packages.unpack(WHEEL, tmp_path / "out" / "some-model")
    assert (tmp_path / "out/some-model/some_model/data/a.txt").read_text() == "text"
    assert counts["file"] == "some_model-1.0-py3-none-any.whl" and len(counts["sha256"]) == 64
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["some-model"]


def test_sources_inside_a_debian_package_are_unpacked(tmp_path, registry):
    make_tar(tmp_path / "inner", {"linux/kernel/fork.c": b"int main;"})
    make_tar(
        registry / "some-docs_1.deb",
        {
            "usr/src/linux.tar.xz": (tmp_path / "inner").read_bytes(),
            "usr/share/doc/other.tar.xz": b"kept as it is",
        },
    )
    packages.unpack(DEB, tmp_path / "out")
    assert (tmp_path / "out/usr/src/linux/kernel/fork.c").read_bytes() == b"int main;"
    assert not (tmp_path / "out/usr/src/linux.tar.xz").exists()
    assert (tmp_path / "out/usr/share/doc/other.tar.xz").exists()


@pytest.mark.parametrize("link", [("evil", "/etc"), ("evil", "../../..")])
def test_links_out_of_a_tar_archive_are_refused(tmp_path, link):
    make_tar(tmp_path / "a.tar.xz", {"a": b"1"}, link)
    with pytest.raises(StageError, match=r"a\.tar\.xz: damaged or unsafe"):
        packages.untar(tmp_path / "a.tar.xz", tmp_path / "out")
    assert not (tmp_path / "out" / "evil").is_symlink()


def test_names_out_of_archives_are_refused(tmp_path):
    make_tar(tmp_path / "a.tar.xz", {"../escaped": b"1"})
    with pytest.raises(StageError, match="damaged or unsafe"):
        packages.untar(tmp_path / "a.tar.xz", tmp_path / "in" / "out")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("../escaped", "1")
    with pytest.raises(StageError, match=r"a\.whl: damaged or unsafe.*escaped reaches outside"):
        packages.unzip(tmp_path / "a.whl", tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("keep", [5, 2500])
def test_damaged_archives_are_named(tmp_path, keep):
    make_tar(tmp_path / "a.tar.xz", {"a": os.urandom(5000)})
    path = tmp_path / "a.tar.xz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StageError, match=r"a\.tar\.xz: damaged or unsafe.*stage=fetch again"):
        packages.untar(path, tmp_path / "out")
    (tmp_path / "a.whl").write_bytes(lzma.compress(b"no zip archive"))
    with pytest.raises(StageError, match=r"a\.whl: damaged"):
        packages.unzip(tmp_path / "a.whl", tmp_path / "out")


def test_a_download_must_leave_one_archive(tmp_path, registry):
    with pytest.raises(StageError, match=r"pypi:some-model==1.0.*left 0 \.whl files"):
        packages.download(WHEEL, tmp_path)


@pytest.mark.parametrize(
    "spec",
    [
        "some-docs",
        "debian:",
        "debian:-o",
        "debian:../x",
        "debian:a b",
        "pypi:some-model",
        "pypi:--index-url==1",
        "pypi:a==1 --pre",
        "npm:x",
    ],
)
def test_other_names_are_refused(spec):
    with pytest.raises(StageError, match='must be "debian:NAME"'):
        packages.folder_name(spec)


def test_folder_is_the_name_without_version():
    assert packages.folder_name(DEB) == "some-docs"
    assert packages.folder_name("debian:linux-source-6.1=6.1.1-1") == "linux-source-6.1"
    assert packages.folder_name(WHEEL) == "some-model"


def fake_program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_failed_commands_are_told_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError, match="apt-get is not installed here.*Debian or Ubuntu"):
        packages.download(DEB, tmp_path)
    fake_program(tmp_path, "apt-get", "echo 'E: Unable to locate package some-docs' >&2; exit 100")
    with pytest.raises(StageError, match="Unable to locate package some-docs; run `apt-get update"):
        packages.download(DEB, tmp_path)
    monkeypatch.setattr(packages, "TIMEOUT_SECONDS", 0.2)
    fake_program(tmp_path, "apt-get", "exec /bin/sleep 30")
    with pytest.raises(StageError, match=r"took longer than 0\.2 s"):
        packages.download(DEB, tmp_path)


def test_pip_is_called_so_that_no_package_code_runs(tmp_path, monkeypatch):
    called = []

    def run(command, **options):
        called.append(command)
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution")

    monkeypatch.setattr(packages.subprocess, "run", run)
    with pytest.raises(StageError, match="cannot download: ERROR: No matching distribution; check"):
        packages.download(WHEEL, tmp_path)
    assert "--only-binary=:all:" in called[0] and "--no-deps" in called[0]
    assert called[0][-1] == "some-model==1.0"
