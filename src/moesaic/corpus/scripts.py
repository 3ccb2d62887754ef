"""Scripts: the writing system of each character of a text, from the names of Unicode characters.

A text is mapped to a string of one class per character, so that counting a script is ``str.count``.
"""

import unicodedata

_SPACE, _OTHER, _MARK, _FOREIGN = " ", ".", "*", "?"

# first words of Unicode character names -> ISO 15924
_SCRIPT_OF_NAME = {
    "LATIN": "Latn", "CYRILLIC": "Cyrl", "GREEK": "Grek", "ARABIC": "Arab", "HEBREW": "Hebr",
    "DEVANAGARI": "Deva", "BENGALI": "Beng", "GURMUKHI": "Guru", "GUJARATI": "Gujr",
    "ORIYA": "Orya", "TAMIL": "Taml", "TELUGU": "Telu", "KANNADA": "Knda", "MALAYALAM": "Mlym",
    "SINHALA": "Sinh", "THAI": "Thai", "LAO": "Laoo", "TIBETAN": "Tibt", "MYANMAR": "Mymr",
    "KHMER": "Khmr", "MONGOLIAN": "Mong", "GEORGIAN": "Geor", "ARMENIAN": "Armn",
    "ETHIOPIC": "Ethi", "HANGUL": "Hang", "HIRAGANA": "Kana", "KATAKANA": "Kana",
    "KATAKANA-HIRAGANA": "Kana", "CJK": "Hani", "BOPOMOFO": "Hani", "SYRIAC": "Syrc",
    "THAANA": "Thaa", "TIFINAGH": "Tfng", "OL": "Olck", "NKO": "Nkoo", "CHEROKEE": "Cher",
    "CANADIAN": "Cans", "VAI": "Vaii", "YI": "Yiii", "MEETEI": "Mtei", "COPTIC": "Copt",
    "GOTHIC": "Goth", "LISU": "Lisu", "JAVANESE": "Java", "BALINESE": "Bali",
    "SUNDANESE": "Sund", "BUGINESE": "Bugi", "SYLOTI": "Sylo", "OSAGE": "Osge", "ADLAM": "Adlm",
}  # fmt: skip

# Unicode scripts that a language's script is composed of
_COMPOSITE_SCRIPTS = {
    "Hans": ("Hani",),
    "Hant": ("Hani",),
    "Jpan": ("Hani", "Kana"),
    "Hang": ("Hang", "Hani"),
    "Kore": ("Hang", "Hani"),
}

_CLASS = {script: chr(0x61 + i) for i, script in enumerate(sorted(set(_SCRIPT_OF_NAME.values())))}


class _ScriptClassTable(dict[int, str]):
    """Class of each character, computed at its first use."""

    def __missing__(self, point: int) -> str:
        found = _class_of(chr(point))
        self[point] = found
        return found


def _class_of(char: str) -> str:
    if char.isspace():
        return _SPACE
    category = unicodedata.category(char)
    if category[0] not in "LM":
        return _OTHER
    words = unicodedata.name(char, "").replace("FULLWIDTH ", "").replace("HALFWIDTH ", "").split()
    if not words or words[0] in ("COMBINING", "MODIFIER"):
        return _MARK
    script = _SCRIPT_OF_NAME.get(words[0])
    return _CLASS[script] if script else _FOREIGN


_TABLE = _ScriptClassTable()
_ASCII = "".join(_class_of(chr(i)) for i in range(128)).encode("ascii").ljust(256, b".")


def script_classes(text: str) -> str:
    """Return a class character for each character of ``text``."""
    if text.isascii():
        return text.encode("ascii").translate(_ASCII).decode("ascii")
    return text.translate(_TABLE)


def count_letters(classes: str) -> int:
    """Return the number of letters and combining marks in a string of classes."""
    return len(classes) - classes.count(_SPACE) - classes.count(_OTHER)


def count_visible(classes: str) -> int:
    """Return the number of characters that are not white space."""
    return len(classes) - classes.count(_SPACE)


def count_script(classes: str, *, script: str) -> int:
    """Return the number of letters of ``script`` (ISO 15924, also Jpan, Hans, ...)."""
    parts = _COMPOSITE_SCRIPTS.get(script, (script,))
    return classes.count(_MARK) + sum(classes.count(_CLASS[s]) for s in parts if s in _CLASS)


def is_known_script(script: str) -> bool:
    """Whether letters of ``script`` can be distinguished from others."""
    return all(s in _CLASS for s in _COMPOSITE_SCRIPTS.get(script, (script,)))


def script_share(text: str, *, script: str) -> float:
    """Return the share of the letters of ``text`` that are of ``script``; 1.0 without letters."""
    seen = script_classes(text)
    letters = count_letters(seen)
    return count_script(seen, script=script) / letters if letters else 1.0
