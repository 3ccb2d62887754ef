"""Sentence splitting for text in any script, after the rules of Unicode (UAX #29).

A boundary is after a character that terminates sentences in its script (``Sentence_Break=STerm``:
"!", "।", "。", "។", ...), or after a full stop if white space follows, the next word does not begin
with a small letter, and what is before is neither an initial, a number of two digits (an ordinal)
nor one of the abbreviations below. Thai, Lao and other scripts
without such characters have no boundaries here: ``serve/long_text.py`` cuts their text at spaces or
by length.
"""

import regex

# these also stand within words, numbers and addresses, so that white space must follow
_AMBIGUOUS = r".․!?…‼⁇⁈⁉‽"
_CLOSING = r"""["'’”»›\p{Pe}\p{Pf}]*"""
_TERMINAL = r"\p{Sentence_Break=STerm}"
_SMALL_LETTER = r"[\p{Pd},;:)\]}]?\s*\p{Sentence_Break=Lower}"
_SENTENCE = regex.compile(
    rf"""
      (?: [{_TERMINAL}--[{_AMBIGUOUS}]] [{_TERMINAL}．]* {_CLOSING} \s*
        | [．] {_CLOSING} \s* (?![\p{{N}}\s])
        | (?<! [{_AMBIGUOUS}] ) (?P<stop> [{_AMBIGUOUS}]++ ) {_CLOSING} \s+ (?! {_SMALL_LETTER} )
      )
    """,
    regex.VERBOSE | regex.VERSION1,
)
_CLAUSE = regex.compile(r"[,;:،؛၊፣፥፤།༎·–—]\s+|[、，；：､]+")
_WORD = regex.compile(r"\s+|\u200b")
_UNSPACED = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
)
_INITIAL = regex.compile(r"(?:^|[\s.(\"'«„“])\p{Lu}\p{M}*$")
_ORDINAL = regex.compile(r"(?<!\p{N})\p{N}{1,2}$")  # "3. Oktober", "1. Open the file"
_LAST_WORD = regex.compile(r"[\p{L}\p{M}.]+$")
# Written with a full stop in the middle of a sentence, a capital letter after it (after the
# suppressions of CLDR's segmentation rules), of all languages together: few are also a last word.
_ABBREVIATIONS_TEXT = """
    mr mrs ms dr prof rev hon st mt jr sr gen col capt lt sgt sen rep gov no nos vol vols p pp fig
    figs eq art ch sec ed eds vs cf al approx dept est inc ltd co corp univ e.g i.e u.s u.k
    hr fr nr bzw bd abb abs aufl ca evtl geb ggf inkl str tel usw vgl z.b d.h u.a s.o s.u z.t
    m mm mme mmes mlle mlles me mgr cie env etc av boul bd n.b p.ex
    sr sra sres srta dra prof ud uds vd vds pág págs núm ej p.ej ee.uu av
    sig sigg dott dott.ssa prof.ssa ing avv geom rag es pag dr.ssa sen
    exmo exma d dona eng arq av
    dhr mevr mej ir drs ing bijv blz enz nl o.a t.a.v d.w.z
    hr fru frk bl.a f.eks t.ex m.m osv s.k dvs kl
    р г гг им ул стр см рис табл т.е т.д т.п т.к проф акад тыс млн млрд руб д кв
    np tj tzn tzw ul al prof inż mgr hab m.in itp itd
    tzv např popř tj mj č str napr resp
    κ κος κα κκ δρ π.χ δηλ κ.λπ σελ
    pl ún dr stb kb ill
    örn bkz vb vs prof doç sn
"""
_ABBREVIATIONS = frozenset(_ABBREVIATIONS_TEXT.split())


def sentence_ends(text: str) -> list[int]:
    """Return where the sentences of a text end, white space after them included."""
    return [
        m.end() for m in _SENTENCE.finditer(text) if not (m["stop"] and _is_abbreviation(text, m))
    ]


def clause_ends(text: str) -> list[int]:
    """Return where parts between commas, semicolons, colons and dashes end."""
    return [m.end() for m in _CLAUSE.finditer(text)]


def word_ends(text: str) -> list[int]:
    """Return where words end: at white space, or U+200B, which divides words in Khmer and Thai."""
    return [m.end() for m in _WORD.finditer(text)]


def middle(text: str) -> list[int]:
    """Return the boundary of user-perceived characters nearest the middle; none if there is one."""
    half = len(text) // 2
    # looked for around the middle only, so that the cost does not grow with the text
    first = max(0, half - 64)
    ends = [first + m.end() for m in regex.finditer(r"\X", text[first : half + 64])]
    ends = [end for end in ends if first < end < len(text)]
    return [min(ends, key=lambda end: abs(end - half))] if ends else []


def ends_inside_a_word(text: str) -> bool:
    """Return whether the text ends with a letter of a script that has spaces between words."""
    return bool(text) and text[-1].isalnum() and not _UNSPACED.search(text[-1])


def _is_abbreviation(text: str, match: "regex.Match[str]") -> bool:
    """Return whether the full stop belongs to the word before it."""
    if match["stop"] not in (".", "․"):
        return False
    before = text[max(0, match.start() - 24) : match.start()]
    if _ORDINAL.search(before) or (
        _INITIAL.search(before) and text[match.end() : match.end() + 1].isalpha()
    ):
        return True
    word = _LAST_WORD.search(before)
    return word is not None and word[0].casefold() in _ABBREVIATIONS
