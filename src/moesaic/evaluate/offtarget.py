"""Off-target rate: how often a system answers in another language than it was asked for.

Two views. *By script*: fewer than half of the letters belong to the target's script; exact, but
blind between languages of one script. *By identification* (py3langid, optional extra ``lid``): the
most likely of the candidate languages is another one; sees Danish for Swedish, errs on short text.
Names and commands stay as they are in any language, so a sentence only counts where the reference
itself is recognised as the target language, and identification needs ``MIN_LETTERS`` letters.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moesaic.data.languages import resolve_language
from moesaic.data.scripts import script_classes, count_letters, is_known_script, script_share

MIN_LETTERS = 20  # below, identification errs too often to accuse anyone
MIN_SCRIPT_SHARE = 0.5


class LanguageIdentifier(Protocol):
    """Says which language a text is in: a code, one of those it was made for."""

    def __call__(self, text: str) -> str: ...


@dataclass(frozen=True, slots=True)
class OffTargetRate:
    """``off`` of ``counted`` sentences; ``note`` says why nothing was counted."""

    off: int
    counted: int
    note: str = ""

    @property
    def rate(self) -> float | None:
        return self.off / self.counted if self.counted else None


@dataclass(frozen=True, slots=True)
class OffTargetRates:
    """Both views of one system in one language."""

    script: OffTargetRate
    identified: OffTargetRate


def measure_off_target(
    outputs: Sequence[str],
    *,
    references: Sequence[str],
    target: str,
    identify: LanguageIdentifier | None,
) -> OffTargetRates:
    """Count off-target outputs. Empty outputs are wrong, but in no language: not counted."""
    said = [(o, r) for o, r in zip(outputs, references, strict=True) if count_letters(script_classes(o))]
    return OffTargetRates(_by_script(said, target=target), _by_identification(said, target, identify))


def load_language_identifier(languages: Sequence[str]) -> LanguageIdentifier | str:
    """Return py3langid restricted to ``languages`` (codes), or why there is none.

    A language that the library does not know is no candidate. Two candidates of one library code
    (Serbian in two scripts) are answered with the first.
    """
    if importlib.util.find_spec("py3langid") is None:
        return "not measured: install the extra, pip install 'moesaic[lid]'"
    langid = importlib.import_module("py3langid.langid")
    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    names: dict[str, str] = {}
    for code in languages:
        names.setdefault(_py3langid_code(code), code)
    known = [name for name in names if name in set(model.nb_classes)]
    if len(known) < 2:
        return "not measured: py3langid knows fewer than two of these languages"
    model.set_languages(known)
    return _Py3LangId(model, {name: names[name] for name in known})


class _Py3LangId:
    def __init__(self, model: object, names: dict[str, str]) -> None:
        self._model, self._names = model, names

    def __call__(self, text: str) -> str:
        name, _ = self._model.classify(text)  # pyright: ignore[reportAttributeAccessIssue]
        return self._names[str(name)]


def _py3langid_code(code: str) -> str:
    row = resolve_language(code)
    return {"nb": "no"}.get(row.iso1 or "", row.iso1 or code)


def _by_script(said: Sequence[tuple[str, str]], *, target: str) -> OffTargetRate:
    script = resolve_language(target).script
    if not is_known_script(script):
        return OffTargetRate(0, 0, f"not measured: letters of {script} are not told apart")
    fair = [o for o, r in said if script_share(r, script=script) >= MIN_SCRIPT_SHARE]
    return OffTargetRate(sum(script_share(o, script=script) < MIN_SCRIPT_SHARE for o in fair), len(fair))


def _by_identification(said: Sequence[tuple[str, str]], target: str, identify: LanguageIdentifier | None) -> OffTargetRate:
    if identify is None:
        return OffTargetRate(0, 0, "not measured")
    long = [
        (o, r) for o, r in said if min(count_letters(script_classes(t)) for t in (o, r)) >= MIN_LETTERS
    ]
    fair = [o for o, r in long if identify(r) == target]
    note = "" if fair else "no reference is long enough and recognised"
    return OffTargetRate(sum(identify(o) != target for o in fair), len(fair), note)
