"""Synthetic languages with exact translations, for tutorials and tests without a network.

English phrases come from a small grammar. Each target language (ISO 639 private-use codes, such as
``qaa_Latn``) has a lexicon, a script and a word order of its own: a model that translates into it
has learnt more than to copy.
"""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from moesaic.corpus.languages import ENGLISH, resolve_language
from moesaic.corpus.pair import Pair
from moesaic.corpus.sources.text_source import LanguageFilter, Progress, SourceFile, TextSource

VERBS = [
    *("open", "close", "save", "delete", "copy", "move", "print", "show", "hide", "share"),
    *("rename", "import"),
]
ADJECTIVES = [
    *("new", "old", "large", "small", "empty", "selected", "public", "private", "hidden"),
    *("last",),
]
NOUNS = [
    *("file", "folder", "page", "image", "user", "message", "report", "window", "table"),
    *("link", "account", "list"),
]
PLACES = ["here", "now", "in the archive", "on this page", "for every user", "without a copy"]
ALPHABETS = {
    "Latn": ("bdfgklmnprstvz", "aeiou"),
    "Cyrl": ("бвгджзклмнпрст", "аеиоу"),
    "Grek": ("βγδζθκλμνπρστ", "αειου"),
}


class SyntheticLanguages(TextSource):
    """``phrases`` English phrases and their translations into each of ``languages``."""

    languages: tuple[str, ...] = ("qaa_Latn", "qab_Cyrl", "qac_Grek")
    phrases: int = Field(default=2000, ge=10, le=8640)
    seed: int = 0

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:  # noqa: ARG002
        return (
            SourceFile("synthetic", Path("synthetic"), version=str(self.seed), licence="CC0-1.0"),
        )

    def read(self, source_file: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair]:
        for code in self.languages:
            if not wanted(code):
                continue
            lexicon = _Lexicon(resolve_language(code).script, seed=f"{self.seed}-{code}")
            for phrase in self._phrases():
                english, target = " ".join(phrase), lexicon.translate(phrase)
                yield Pair(english, target, ENGLISH, code, source_file.name, source_file.licence)

    def _phrases(self) -> list[tuple[str, ...]]:
        every = list(itertools.product(VERBS, ["the"], ADJECTIVES, NOUNS, PLACES))
        chosen = random.Random(self.seed).sample(every, min(self.phrases, len(every)))
        return [(v.capitalize(), *rest) for v, *rest in chosen]


class _Lexicon:
    """An invented language: a word for each English word, and verb-last or verb-first order."""

    def __init__(self, script: str, *, seed: str) -> None:
        self._draw = random.Random(seed)
        self._consonants, self._vowels = ALPHABETS.get(script, ALPHABETS["Latn"])
        self._verb_last = self._draw.random() < 0.5
        used: set[str] = set()
        self._words = {
            word: self._new_word(used) for word in [*VERBS, *ADJECTIVES, *NOUNS, *PLACES]
        }

    def translate(self, phrase: tuple[str, ...]) -> str:
        verb, _, adjective, noun, place = (phrase[0].lower(), *phrase[1:])
        order = (
            [place, noun, adjective, verb] if self._verb_last else [verb, noun, adjective, place]
        )
        text = " ".join(self._words[word] for word in order)  # without an article
        return text[0].upper() + text[1:]

    def _new_word(self, used: set[str]) -> str:
        while True:
            syllables = self._draw.randint(2, 3)
            word = "".join(
                self._draw.choice(self._consonants) + self._draw.choice(self._vowels)
                for _ in range(syllables)
            )
            if word not in used:
                used.add(word)
                return word
