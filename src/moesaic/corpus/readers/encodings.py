"""Which encoding a file that is not UTF-8 may have, for the advice in the error message.

Candidates are judged by how many characters of a sample are frequent in texts of that encoding.
The advice names an encoding only with the text as it would read, so that a wrong guess is seen
before the file is converted; where several read equally well, all are shown.
"""

import codecs
import re

_BOMS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# iconv's name -> the characters beyond ASCII that are frequent in texts of that encoding
_WESTERN, _CENTRAL = "äöüßéèàçñáíóúâêîôûæøåãõëïùìò", "áéíóúýčďěňřšťůžąćęłńśźżőűöüäîăâ"
_CYRILLIC, _GREEK = "оеаинтсрвлкмдпуяыьг", "αοιετσνηυρπκμλςίόάέώή"
_ARABIC, _JAPANESE = (
    "اليمنوتربسعدهةفقكحأ",
    "のにはをたがでてとしれさるいもなこっまかきけだくすせうらりですます",
)
_HANZI = "的一是不了在人有我他中大上到和你地出也要下以生会自去之家可小天海面面看手心回事用好多"
_TABLE = {
    "EUC-JP": _JAPANESE,
    "SHIFT_JIS": _JAPANESE,
    "EUC-KR": "이다는을의에가하고지도로기사리시어인스자아나해서대한라요",
    "GB18030": _HANZI + "这来国个说们为时过学对后里还没开发经请",
    "BIG5": _HANZI + "這來國個說們為時過學對後裡還沒開發經請",
    "WINDOWS-1252": _WESTERN,
    "WINDOWS-1250": _CENTRAL,
    "ISO-8859-2": _CENTRAL,
    "WINDOWS-1254": "ışğçöüİÇÖÜŞ",
    "WINDOWS-1257": "ąčęėįšųūžāēīķļņģõäöü",
    "WINDOWS-1251": _CYRILLIC,
    "KOI8-R": _CYRILLIC,
    "CP866": _CYRILLIC,
    "ISO-8859-5": _CYRILLIC,
    "WINDOWS-1253": _GREEK,
    "ISO-8859-7": _GREEK,
    "WINDOWS-1255": "יוהלאמתרבשנגחדפק",
    "WINDOWS-1256": _ARABIC,
    "ISO-8859-6": _ARABIC,
    "TIS-620": "านรกอเงยมลวดทสตะปบคหแจพ",
}
_MULTI_BYTE = ("EUC-JP", "SHIFT_JIS", "EUC-KR", "GB18030", "BIG5")
_LATIN = [name for name, letters in _TABLE.items() if letters[-1] < "Ͱ"]
_SIGNS = "“”‘’„«»–—…·°§©®€№、。「」（），：！？"
_HIGH_RUN = re.compile(rb"[\x80-\xff]{2,}")
_WORD = re.compile(r"[^\W\d_]*[^\x00-\x7f][^\s]*")
_SHOWN = 24  # characters of a reading
_JUDGED = 8192  # bytes before and after the place
_MARGIN, _DOUBTFUL = 0.05, 0.6


def looks_like_utf16(line: bytes) -> bool:
    """Whether the first line of a file is UTF-16 or UTF-32: a mark, or NULs at every other byte."""
    return _wide_encoding(line) != ""


def advise_encoding(sample: bytes, *, at: int) -> str:
    """Return what to do with a file whose byte ``at`` of ``sample`` is not UTF-8."""
    wide = _wide_encoding(sample)
    if wide:
        return f"it looks like {wide}: convert it, e.g. iconv -f {wide} -t UTF-8"
    if _mostly_utf8(sample):
        return (
            "most of the file is UTF-8, so this place is damaged: correct it, or drop such bytes "
            "with iconv -c -f UTF-8 -t UTF-8"
        )
    readings = _best_readings(sample, at=at)
    if not readings:
        return "convert it from its encoding, e.g. iconv -f ENCODING -t UTF-8 (iconv -l lists them)"
    shown = " or ".join(f"{name} ({text!r})" for name, text in readings)
    name = readings[0][0] if len(readings) == 1 else "ENCODING"
    return (
        f"it reads best as {shown}: if that is its text, convert it with iconv -f {name} -t UTF-8, "
        "else from the encoding that it has"
    )


def _wide_encoding(sample: bytes) -> str:
    """Return the UTF-16 or UTF-32 that the beginning of a file is in, or an empty string."""
    for mark, name in _BOMS:
        if sample.startswith(mark):
            return name
    head = sample[:4096]
    if len(head) < 4:
        return ""
    for name, upper in (("UTF-32LE", (2, 3)), ("UTF-32BE", (0, 1))):
        if len(head) >= 8 and not any(any(head[i::4]) for i in upper):
            return name
    # the upper bytes of alphabets are 0 to 6
    even, odd = (sum(b <= 6 for b in head[i::2]) / len(head[i::2]) for i in (0, 1))
    if max(even, odd) > 0.75 and min(even, odd) < 0.25:
        return "UTF-16LE" if odd > even else "UTF-16BE"
    # scripts above have no such byte, but their line ends do
    little, big = sample.count(b"\n\0"), sample.count(b"\0\n")
    is_little = little > 0 and little == sample.count(b"\n", 0, -1)
    is_big = big > 0 and big == sample.count(b"\n")
    if is_little and is_big:
        is_big = sample.index(b"\n") % 2 == 1
    return "UTF-16BE" if is_big else "UTF-16LE" if is_little else ""


def _mostly_utf8(sample: bytes) -> bool:
    text = sample.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    good = sum(1 for char in text if char > "\x7f") - broken
    return good > 8 * broken


def _best_readings(sample: bytes, *, at: int) -> list[tuple[str, str]]:
    """Return up to three (encoding, a word in it) that read about equally well, the best first."""
    start = max(sample.rfind(b"\n", 0, max(0, at - 2048)) + 1, at - _JUDGED)
    end = sample.rfind(b"\n", at, at + _JUDGED) + 1 or at + _JUDGED
    high = sum(byte > 0x7F for byte in sample)
    runs = sum(len(run) for run in _HIGH_RUN.findall(sample))
    names = [name for name in _TABLE if runs * 2 > high or name not in _MULTI_BYTE]
    scored = []
    for name in names:
        text = _decoded(sample[start:end], name)
        if text is not None:
            scored.append((_implausibility(text, name), names.index(name), name))
    scored.sort()
    if not scored or scored[0][0] > _DOUBTFUL:
        return []
    line = _line_at(sample, at)
    found: dict[str, str] = {}
    for score, _, name in scored:
        text = _decoded(line, name)
        if score <= scored[0][0] + _MARGIN and text is not None and len(found) < 3:
            found.setdefault(_excerpt(text), name)
    return [(name, text) for text, name in found.items()]


def _decoded(raw: bytes, name: str) -> str | None:
    try:
        return raw.decode(name)
    except UnicodeDecodeError as error:
        # the sample may end within a character
        if len(raw) - error.start < 4 and error.start:
            return _decoded(raw[: error.start], name)
        return None


def _line_at(sample: bytes, at: int) -> bytes:
    start, end = sample.rfind(b"\n", 0, at) + 1, sample.find(b"\n", at)
    line = sample[start : end if end >= 0 else len(sample)]
    return line[:4096] if len(line) <= 4096 or at - start < 2048 else sample[at : at + 2048]


def _excerpt(text: str) -> str:
    """Return the first word with a character beyond ASCII, with what stands around it."""
    match = _WORD.search(text)
    start = match.start() if match else 0
    return " ".join(text[start : start + _SHOWN].split())


def _implausibility(text: str, name: str) -> float:
    """Return the share of characters beyond ASCII that are not frequent in texts of ``name``."""
    high = [pair for pair in zip(" " + text, text, strict=False) if pair[1] > "\x7f"]
    if not high or any(char < "\xa0" for _, char in high):  # C1 controls are in no text
        return 1.0
    signs = sum(char in _SIGNS for _, char in high)
    # a capital begins a word: in another encoding of its script it stands within one; words of
    # Latin letters have ASCII ones between the others
    frequent = sum(
        (char in _TABLE[name] or (char.lower() in _TABLE[name] and not before.isalpha()))
        and (before <= "\x7f" or name not in _LATIN)
        for before, char in high
    )
    # single letters of another script in words of Latin ones are accents of another encoding
    latin = sum(char.isalpha() and char.isascii() for char in text)
    mixed = name not in (*_LATIN, *_MULTI_BYTE) and latin > 2 * len(high)
    # that bytes are whole characters of several bytes says much by itself
    return 0.5 * mixed + 1 - frequent / max(1, len(high) - signs) - 0.4 * (name in _MULTI_BYTE)
