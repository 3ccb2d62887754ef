"""Debian packages: downloaded with the user's apt, cached and read, never installed."""

import fnmatch
import lzma
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import zstandard

from moesaic.core.errors import DataError, listed
from moesaic.corpus.data_home import packages_dir
from moesaic.corpus.languages import Language, resolve_locale
from moesaic.corpus.sources.package_archives import ArchiveMember
from moesaic.corpus.sources.text_source import Progress, SourceFile

_TIMEOUT_S = 3600
_BATCH = 50
_AR_HEADER = 60
_MAX_LICENCES_SHOWN = 4
_COPYRIGHT = re.compile(r"^\./usr/share/doc/[^/]+/copyright$")
_LICENCE = re.compile(r"^License:[ \t]*(\S[^\n]*)$", re.MULTILINE)
_UNAVAILABLE = re.compile(r"\b404\b|Not Found|no longer|Can't find a source|Hash Sum mismatch")


def debs_dir() -> Path:
    """Return the folder of downloaded .deb files."""
    return packages_dir() / "deb"


def fetch_debs(patterns: tuple[str, ...], *, progress: Progress) -> tuple[SourceFile, ...]:
    """Return the packages whose names match ``patterns`` (``libreoffice-l10n-*``), as local files.

    One that apt does not list or cannot download has a ``missing_reason``. Without apt, the cached
    ones are returned. Raises DataError when there are none.
    """
    folder = debs_dir()
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("apt-get") is None:
        return _without_apt(patterns, folder=folder)
    names = _matching(patterns)
    if not names:
        raise DataError(
            f"apt lists no package named like {', '.join(patterns[:3])} ...: run `apt-get update` "
            "first"
        )
    gone = {p: "apt does not list it" for p in patterns if "*" not in p and p not in names}
    missing = _not_cached(names, folder=folder)
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        progress(f"downloading {start + len(batch)}/{len(missing)} Debian packages")
        gone |= _download(batch, folder=folder)
    found = _cached_packages(names, folder=folder)
    if not found:
        why = next(iter(gone.values()), "apt has names for them, but no files")
        raise DataError(
            f"none of {len(names)} packages could be downloaded: {why}; check the network and run "
            "`apt-get update`"
        )
    names_found = {source_file.name for source_file in found}
    left = {name: why for name, why in sorted(gone.items()) if name not in names_found}
    if left:
        progress(f"left out, not downloadable: {len(left)} Debian packages ({listed(left)})")
    return found + tuple(SourceFile(n, folder / n, missing_reason=why) for n, why in left.items())


def _download(names: list[str], *, folder: Path) -> dict[str, str]:
    """Download a batch, or each package alone if one is unavailable; return the failures."""
    try:
        run_apt(["apt-get", "download", "-q", *names], folder=folder)
        return {}
    except DataError as error:
        if not _UNAVAILABLE.search(str(error)):
            raise
        if len(names) == 1:
            return {names[0]: str(error).partition("; check the network")[0]}
    return {n: why for name in names for n, why in _download([name], folder=folder).items()}


def _without_apt(patterns: tuple[str, ...], *, folder: Path) -> tuple[SourceFile, ...]:
    names = {path.name.split("_")[0] for path in folder.glob("*.deb")}
    found = [n for n in sorted(names) if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if not found:
        raise DataError(
            "apt-get was not found: this corpus is made from Debian's packages. Build it on Debian "
            f"or Ubuntu (a container will do), or copy .deb files into {folder}; `catalogues` "
            "needs no Debian"
        )
    return _cached_packages(found, folder=folder)


def _matching(patterns: tuple[str, ...]) -> list[str]:
    known = run_apt(["apt-cache", "pkgnames"], folder=Path(".")).split()
    exact, globs = set(patterns), [p for p in patterns if "*" in p]
    return sorted(n for n in known if n in exact or any(fnmatch.fnmatchcase(n, p) for p in globs))


def _not_cached(names: list[str], *, folder: Path) -> list[str]:
    """Return the packages whose current version is not cached."""
    missing = []
    for start in range(0, len(names), _BATCH):
        batch = names[start : start + _BATCH]
        shown = run_apt(["apt-cache", "show", "--no-all-versions", *batch], folder=folder)
        for stanza in shown.split("\n\n"):
            name = re.search(r"^Package: (\S+)", stanza, re.MULTILINE)
            version = re.search(r"^Version: (\S+)", stanza, re.MULTILINE)
            if name and version and not any(folder.glob(_file_name(name[1], version[1]))):
                missing.append(name[1])
    return sorted(set(missing))


def _file_name(name: str, version: str) -> str:
    return f"{name}_{version.replace(':', '%3a')}_*.deb"


def _cached_packages(names: list[str], *, folder: Path) -> tuple[SourceFile, ...]:
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("*.deb"), key=lambda p: p.stat().st_mtime_ns):
        newest[path.name.split("_")[0]] = path
    return tuple(
        SourceFile(name, newest[name], newest[name].name.split("_")[1].replace("%3a", ":"))
        for name in names
        if name in newest
    )


def run_apt(command: list[str], *, folder: Path) -> str:
    """Run an apt command in ``folder`` and return its output. Raises DataError when it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{command[0]} did not finish in {_TIMEOUT_S} s") from error
    if done.returncode:
        errors = "; ".join(x for x in done.stderr.splitlines() if x.startswith("E:"))[:400]
        raise DataError(
            f"{' '.join(command[:2])} failed: {errors or 'no reason given'}; check the network and "
            "run `apt-get update`; what was downloaded is kept"
        )
    return done.stdout


def deb_members(path: Path, *, pattern: re.Pattern[str]) -> Iterator[ArchiveMember]:
    """Yield the files of a .deb whose path matches ``pattern``.

    Raises DataError when the package is damaged.
    """
    try:
        with path.open("rb") as stream:
            name, data = _data_archive(stream, path=path)
            with tarfile.open(fileobj=_decompress(name, data), mode="r|") as tar:
                for info in tar:
                    if info.isfile() and pattern.search(info.name):
                        content = tar.extractfile(info)
                        found = content.read() if content else b""
                        yield ArchiveMember(info.name, lambda found=found: found)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise DataError(
            f"{path}: the package is damaged or cut short ({error}); delete it"
        ) from error


def _data_archive(stream: BinaryIO, *, path: Path) -> tuple[str, bytes]:
    """Return the name and bytes of ``data.tar.*`` in a .deb, which is an ar archive."""
    if stream.read(8) != b"!<arch>\n":
        raise DataError(f"{path}: not a Debian package")
    while len(header := stream.read(_AR_HEADER)) == _AR_HEADER:
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return name, stream.read(size)
        stream.seek(size + size % 2, 1)
    raise DataError(f"{path}: the package is cut short: it has no data.tar")


def _decompress(name: str, data: bytes) -> BinaryIO:
    if name.endswith(".xz"):
        return lzma.open(BytesIO(data))  # type: ignore[return-value]
    if name.endswith(".zst"):
        return BytesIO(zstandard.ZstdDecompressor().stream_reader(BytesIO(data)).read())
    if name.endswith(".gz"):
        return BytesIO(zlib.decompress(data, wbits=31))
    return BytesIO(data)


@dataclass(frozen=True, slots=True)
class LanguagePacks:
    """The packages ``PREFIX-LOCALE`` of a program; ``english`` are the locales of one side."""

    prefix: str
    english: tuple[str, ...]

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        """Return them as local files. Raises DataError where no English one is among them."""
        found = fetch_debs((f"{self.prefix}-*",), progress=progress)
        if not any(self.english_packs(file) for file in found if not file.missing_reason):
            wanted = " and ".join(f"{self.prefix}-{code}" for code in self.english)
            raise DataError(f"{wanted} could not be downloaded: there is no English side")
        return found

    def english_packs(self, file: SourceFile) -> tuple[Path, ...]:
        """Return the cached English packages that have the version of ``file``."""
        version = file.path.name.partition("_")[2]
        paths = (file.path.with_name(f"{self.prefix}-{code}_{version}") for code in self.english)
        return tuple(path for path in paths if version and path.is_file())

    def language(self, file: SourceFile) -> Language | None:
        """Return the language of a package; None for a variant."""
        return resolve_locale(file.name.removeprefix(f"{self.prefix}-"))


def debian_licence(source_file: SourceFile) -> str:
    """Return the licence names in a package's copyright file: several, as packages mix them."""
    for member in deb_members(source_file.path, pattern=_COPYRIGHT):
        names = list(dict.fromkeys(_LICENCE.findall(member.read().decode("utf-8", "replace"))))
        more = " and others" if len(names) > _MAX_LICENCES_SHOWN else ""
        return ", ".join(names[:_MAX_LICENCES_SHOWN]) + more or "see its copyright file"
    return "see its copyright file"
