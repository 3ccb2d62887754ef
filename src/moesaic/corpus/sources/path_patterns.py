"""Path patterns of corpus files: wildcards, folders, and languages that are parts of a path.

``news/{source}-{target}.tsv`` and ``locale/{lang}/LC_MESSAGES/*.po`` find files and their
languages; ``*``, ``?`` and ``[...]`` match within a name, ``**/`` any number of folders.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moesaic.core.errors import DataError, did_you_mean
from moesaic.corpus.languages import resolve_locale
from moesaic.corpus.sources.text_source import Progress, SourceFile

LANGUAGE_PLACES = ("source", "target", "lang")
MAX_FOUND_FILES = 100_000  # by one pattern
MAX_PATTERN_PARTS = 100
_TOKEN = re.compile(r"\{(?P<place>\w*)\}|\*\*/|\*\*|\*|\?|\[!?\]?[^\]/]*\]|[^*?\[{]+|.", re.DOTALL)
_WILD = re.compile(r"[*?\[{]")
_LANGUAGE_LENGTHS = range(2, 41)
_LANGUAGE = re.compile(r"[A-Za-z][\w@ -]*", re.ASCII)
Places = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that a pattern matches, with the code of each place; or why it cannot be read."""

    path: Path
    languages: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def is_pattern(path: str) -> bool:
    """Whether a path has wildcards or places; a file of exactly that name is no pattern."""
    return bool(_WILD.search(path)) and not Path(path).is_file()


def places_of(path: str) -> tuple[str, ...]:
    """Return the places for languages in a path. Raises DataError: a name that is none."""
    places = [match["place"] for match in _TOKEN.finditer(path) if match["place"] is not None]
    for place in places:
        if place not in LANGUAGE_PLACES:
            known = [f"{{{name}}}" for name in LANGUAGE_PLACES]
            raise DataError(
                f"{path}: {{{place}}} is no place for a language: expected one of "
                f"{', '.join(known)}{did_you_mean(f'{{{place}}}', known)}"
            )
    return tuple(dict.fromkeys(places))


def find_matches(pattern: str) -> list[FoundFile]:
    """Return the files that a pattern matches, sorted by path. Raises DataError: too many."""
    places_of(pattern)
    tokens = [match[0] for match in _TOKEN.finditer(pattern)]
    if len(tokens) > MAX_PATTERN_PARTS:
        raise DataError(
            f"{pattern[:60]}...: {len(tokens)} wildcards and texts between them, at "
            f"most {MAX_PATTERN_PARTS} are read"
        )
    found = []
    for path in sorted(_bounded(_candidates(pattern), pattern=pattern)):
        readings = _Matcher(tokens, path).readings()
        if readings:
            found.append(_with_languages(Path(path), readings))
    return found


def find_user_files(text: str, *, readable: Callable[[Path], bool]) -> list[FoundFile]:
    """Return the files of a folder that are ``readable``, or those that a pattern matches."""
    path = Path(text)
    if path.is_dir():
        return [FoundFile(inner) for inner in files_below(path) if readable(inner)]
    return find_matches(text) if is_pattern(text) else []


def nothing_found(text: str, *, kinds: Iterable[str], expected: str) -> DataError:
    """Return the error of a path, folder or pattern without a file of these ``kinds``."""
    path = Path(text)
    if path.is_dir():
        return DataError(f"{path}: no file of {', '.join(kinds)} below this folder")
    if is_pattern(text):
        return DataError(f"{path}: no file matches this pattern")
    names = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
    return DataError(f"{path}: no such {expected}{did_you_mean(path.name, names)}")


def require_readable(files: Sequence[SourceFile], *, progress: Progress) -> list[SourceFile]:
    """Return the files that can be read; say why each other is left out.

    Raises DataError: none can be read.
    """
    for file in files:
        if file.missing_reason:
            progress(f"{file.path} is left out: {file.missing_reason}")
    readable = [file for file in files if not file.missing_reason]
    if not readable:
        raise DataError(f"no file can be read: {files[0].path}: {files[0].missing_reason}")
    return readable


def files_below(folder: Path) -> list[Path]:
    """Return every file below a folder, sorted; hidden ones and links to folders are left out."""
    return sorted(Path(p) for p in _bounded(_walk(str(folder)), pattern=str(folder)))


def _candidates(pattern: str) -> Iterator[str]:
    if "**" in pattern:  # an own walk: links to folders could lead in circles
        fixed = _WILD.split(pattern, maxsplit=1)[0].rpartition("/")
        yield from _walk(fixed[0] + fixed[1] or ".")
        return
    plain = re.sub(r"\{\w*\}", "*", pattern)
    yield from (path for path in glob.iglob(plain) if os.path.isfile(path))


def _walk(folder: str) -> Iterator[str]:
    prefix = "" if folder == "." else os.path.join(folder, "")
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(where, folder)
        start = prefix if inside == "." else os.path.join(prefix + inside, "")
        yield from (start + n for n in names if not n.startswith(".") and os.path.isfile(start + n))


def _bounded(paths: Iterable[str], *, pattern: str) -> Iterator[str]:
    for number, path in enumerate(paths):
        if number == MAX_FOUND_FILES:
            raise DataError(f"{pattern}: more than {MAX_FOUND_FILES:,} files; narrow the pattern")
        yield path


def _with_languages(path: Path, readings: set[Places]) -> FoundFile:
    """Choose between the readings of a path: only those whose languages are all known count."""
    known: dict[Places, int] = {}
    for reading in readings:
        languages = [(place, resolve_locale(text)) for place, text in reading]
        codes = tuple((place, found.code) for place, found in languages if found)
        if len(codes) == len(reading):
            length = sum(len(text) for _, text in reading)
            known[codes] = max(length, known.get(codes, 0))
    if not known:
        texts = sorted({text for reading in readings for _, text in reading}, key=len)
        return FoundFile(path, problem=f"no language, or a variant of one: {texts[-1]}")
    longest = [codes for codes, length in known.items() if length == max(known.values())]
    if len(longest) > 1:  # pt-BR-en might be pt and BR-en; pt_BR at the end is not Breton
        both = " or ".join(", ".join(code for _, code in codes) for codes in sorted(longest))
        raise DataError(f"{path}: its name can be read as {both}; list the file by itself")
    return FoundFile(path, dict(longest[0]))


class _Matcher:
    """Every way in which a path fits the tokens of a pattern, in time bounded by their product."""

    def __init__(self, tokens: list[str], path: str) -> None:
        self._tokens, self._path = tokens, path
        self._known: dict[tuple[int, int], set[Places]] = {}

    def readings(self) -> set[Places]:
        """Return the texts at the places, for each way; places of one name have equal texts."""
        unique = {tuple(sorted(set(found))) for found in self._from(0, 0)}
        return {found for found in unique if len({place for place, _ in found}) == len(found)}

    def _from(self, index: int, start: int) -> set[Places]:
        if index == len(self._tokens):
            return {()} if start == len(self._path) else set()
        if (index, start) not in self._known:
            self._known[index, start] = {
                (*place, *rest)
                for end, place in self._ends(self._tokens[index], start)
                for rest in self._from(index + 1, end)
            }
        return self._known[index, start]

    def _ends(self, token: str, start: int) -> Iterator[tuple[int, Places]]:
        path, rest = self._path, self._path[start:]
        if token == "**/":
            yield start, ()
            yield from ((start + i + 1, ()) for i, char in enumerate(rest) if char == "/")
        elif token == "**":
            yield len(path), ()
        elif token == "*":
            name = rest.partition("/")[0]
            yield from ((start + length, ()) for length in range(len(name) + 1))
        elif token.startswith("{") and token.endswith("}"):
            yield from self._languages(token[1:-1], start)
        elif token == "?" or (token.startswith("[") and len(token) > 1):
            if rest[:1] not in ("", "/") and fnmatch.fnmatchcase(rest[0], token):
                yield start + 1, ()
        elif path.startswith(token, start):
            yield start + len(token), ()

    def _languages(self, place: str, start: int) -> Iterator[tuple[int, Places]]:
        """A language ends where its letters end: ``lt`` is no language of ``default``."""
        path = self._path
        if start and path[start - 1].isalnum():
            return
        for end in (start + n for n in _LANGUAGE_LENGTHS if start + n <= len(path)):
            bounded = end == len(path) or not path[end].isalnum()
            if bounded and _LANGUAGE.fullmatch(path, start, end):
                yield end, ((place, path[start:end]),)
