"""Lines of plain and compressed files: ends, encodings, limits."""

import lzma
import tracemalloc
from pathlib import Path

import pytest
from catalogue_files import compress

from moesaic.core.errors import UserError
from moesaic.corpus.readers import limits
from moesaic.corpus.readers.compressed import COMPRESSED, open_bytes
from moesaic.corpus.readers.text_lines import read_all_bytes, read_lines, replace_lone_surrogates


def lines(tmp_path: Path, data: bytes, name: str = "a.txt") -> list[str]:
    (tmp_path / name).write_bytes(data)
    return [line for _, line in read_lines(tmp_path / name)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\rb\rc\r", ["a", "b", "c"]),
        (b"a\rb\rc", ["a", "b", "c"]),
        (b"a\r\rb\r\r", ["a", "", "b", ""]),
        (b"\ra", ["", "a"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (
            b"a\rb\nc\n",
            ["a\rb", "c"],
        ),  # a stray CR is text: the other side of a Moses pair has none
        ("a\u2028b\u0085c\vd\fe\x1cf\n".encode(), ["a\u2028b\u0085c\vd\fe\x1cf"]),
        ("\ufeffa\n\ufeffb\n".encode(), ["a", "\ufeffb"]),
        (b"a\0b\n", ["a\0b"]),
        (b"", []),
    ],
)
def test_lines_end_in_lf_or_in_cr_where_there_is_no_lf(
    tmp_path: Path, data: bytes, expected: list[str]
) -> None:
    assert lines(tmp_path, data) == expected


@pytest.mark.parametrize("size", [65_530, 65_536, 150_000])
def test_lines_that_end_in_cr_are_the_same_in_blocks_of_any_size(tmp_path: Path, size: int) -> None:
    texts = [f"{i} {'ü' * (i % 7)}" for i in range(size // 8)]
    data = "\r".join(texts).encode()
    assert lines(tmp_path, data) == texts
    assert lines(tmp_path, data.replace(b"\r", b"\r\n")) == texts


SAMPLES = {
    "de": "Öffne die Tür\nSchließe das Fenster\n",
    "fr": "Le café est fermé à Noël\nça va être très difficile\n",
    "pl": "Zażółć gęślą jaźń. Proszę zamknąć okno\nMiło mi cię poznać, dziękuję\n",
    "cs": "Příliš žluťoučký kůň úpěl ďábelské ódy\nZavřete prosím okno\n",
    "tr": "İyi günler, nasılsınız? Kapıyı açınız şimdi\n",
    "ru": "Открыть дверь\nЗакройте окно, пожалуйста\nМоре спокойно сегодня\n",
    "el": "Άνοιξε την πόρτα\nΚλείσε το παράθυρο παρακαλώ\n",
    "ja": "ドアを開けてください\n窓を閉めてください。今日は海が静かです\n",
    "ko": "문을 열어 주세요\n창문을 닫아 주세요. 오늘 바다가 잔잔합니다\n",
    "zh": "打开软件\n请关上窗户。今天的海很平静,我们去看看吧\n",
    "zt": "開啟軟體\n請關上窗戶。今天的海很平靜,我們去看看吧\n",
}


@pytest.mark.parametrize(
    ("text", "encoding", "advice"),
    [
        ("de", "latin-1", "iconv -f WINDOWS-1252"),
        ("fr", "cp1252", "iconv -f WINDOWS-1252"),
        ("pl", "cp1250", "iconv -f WINDOWS-1250"),
        ("pl", "iso8859-2", "iconv -f ISO-8859-2"),
        ("cs", "cp1250", "iconv -f WINDOWS-1250"),
        ("tr", "cp1254", "iconv -f WINDOWS-1254"),
        ("ru", "cp1251", "iconv -f WINDOWS-1251"),
        ("ru", "koi8-r", "iconv -f KOI8-R"),
        ("ru", "cp866", "iconv -f CP866"),
        ("ja", "euc-jp", "iconv -f EUC-JP"),
        ("ja", "shift_jis", "iconv -f SHIFT_JIS"),
        ("ko", "euc-kr", "iconv -f EUC-KR"),
        ("zh", "gb18030", "iconv -f GB18030"),
        ("zt", "big5", "iconv -f BIG5"),
    ],
)
def test_the_advice_names_the_encoding_and_shows_the_text_in_it(
    tmp_path: Path, text: str, encoding: str, advice: str
) -> None:
    with pytest.raises(UserError, match=r"a\.txt, line \d+: not UTF-8 \(bytes") as error:
        lines(tmp_path, SAMPLES[text].encode(encoding))
    assert advice in str(error.value)
    word = next(word for word in SAMPLES[text].split() if not word.isascii())
    assert word in str(error.value)


@pytest.mark.parametrize("text", ["de", "ru", "ja"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_recognised_with_and_without_a_mark(
    tmp_path: Path, text: str, encoding: str
) -> None:
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(UserError, match=rf"looks like {name}: .*iconv -f {name} -t UTF-8"):
        lines(tmp_path, SAMPLES[text].encode(encoding))


def test_ascii_in_utf16_is_no_utf8_though_it_could_be_decoded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="looks like UTF-16LE"):
        lines(tmp_path, "Open the door\n".encode("utf-16-le"))


def test_no_encoding_is_named_where_none_fits_or_the_file_is_almost_utf8(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="iconv -f ENCODING -t UTF-8"):
        lines(tmp_path, bytes(range(0x80, 0x100)))
    good = "Schöne Grüße aus München, die Tür öffnet sich\n".encode() * 20
    with pytest.raises(UserError, match=r"line 21: .*most of the file is UTF-8.*damaged"):
        lines(tmp_path, good + b"kaputt \xff\n" + good)
    with pytest.raises(UserError, match=r"WINDOWS-1252 \('lepè.*or .*'lepč"):
        lines(tmp_path, b"lep\xe8 dom\xe1\n")


@pytest.mark.parametrize("suffix", ["", *COMPRESSED])
def test_a_line_above_the_limit_is_refused_with_its_number(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 1 << 16)
    fits = b"a" * (1 << 16) + b"\nb\n"
    assert len(lines(tmp_path, compress(fits, suffix), f"a.txt{suffix}")) == 2
    for end in (b"\n", b"\r", b""):
        data = b"x" + (end or b"\n") + b"a" * 200_000 + end
        with pytest.raises(UserError, match=r"a\.txt.*, line 2: longer than 64 KiB.*break it") as e:
            lines(tmp_path, compress(data, suffix), f"a.txt{suffix}")
        assert len(str(e.value)) < 400


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_file_that_expands_without_end_is_refused_early(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FREE_EXPANSION_BYTES", 1 << 17)
    path = tmp_path / f"a.tsv{suffix}"
    path.write_bytes(compress(b"a\tb\n" * (1 << 17), suffix))
    with pytest.raises(UserError, match=r"expands to more than 250 times its [\d,]+ bytes.*decomp"):
        for _ in read_lines(path):
            pass
    monkeypatch.setattr(limits, "MAX_EXPANSION", 10**6)
    assert sum(1 for _ in read_lines(path)) == 1 << 17


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_decompressor_takes_little_memory_whatever_the_block_holds(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FREE_EXPANSION_BYTES", 1 << 30)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(bytes(32 << 20), suffix))
    tracemalloc.start()
    with open_bytes(path) as stream:
        while stream.read(1 << 16):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_parts_that_are_compressed_one_by_one_are_one_file(tmp_path: Path, suffix: str) -> None:
    parts = [compress(f"{i}\n".encode(), suffix) for i in range(50)]
    assert lines(tmp_path, b"".join(parts), f"a{suffix}") == [str(i) for i in range(50)]


def test_padding_between_the_streams_of_an_xz_file_is_no_text(tmp_path: Path) -> None:
    data = lzma.compress(b"a\n") + bytes(8) + lzma.compress(b"b\n") + bytes(4)
    assert lines(tmp_path, data, "a.xz") == ["a", "b"]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_an_archive_cut_short_or_damaged_is_named(tmp_path: Path, suffix: str) -> None:
    whole = compress(b"".join(b"%d\n" % (i * i) for i in range(3000)), suffix)
    middle = len(whole) // 2
    for data in (whole[:middle], b"plain text\n", whole[:middle] + b"\xff" * 40 + whole[middle:]):
        with pytest.raises(UserError, match=rf"a{suffix}: the archive is damaged or cut short"):
            lines(tmp_path, data, f"a{suffix}")


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_part_with_a_damaged_beginning_is_not_taken_for_the_end(
    tmp_path: Path, suffix: str
) -> None:
    whole = compress(b"first\n", suffix)
    damaged = b"?" + compress(b"second\n", suffix)[1:]
    with pytest.raises(UserError, match=rf"a{suffix}: the archive is damaged or cut short"):
        lines(tmp_path, whole + damaged, f"a{suffix}")


def test_an_xz_file_that_wants_gigabytes_for_its_dictionary_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    data = lzma.compress(b"a\n", filters=filters)
    assert lines(tmp_path, data, "a.xz") == ["a"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "MAX_DICTIONARY_BYTES", 1 << 16)
        with pytest.raises(UserError, match=r"damaged or cut short.*[Mm]emory"):
            lines(tmp_path, data, "a.xz")


def test_a_catalogue_above_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CATALOGUE_BYTES", 1000)
    (tmp_path / "a.po").write_bytes(b"#" * 1001)
    with pytest.raises(UserError, match=r"a\.po: more than 1,000 bytes, the limit of a catalogue"):
        read_all_bytes(tmp_path / "a.po")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "folder"])
def test_a_path_that_cannot_be_opened_is_an_error_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError):
        list(read_lines(tmp_path / name))


def test_lone_surrogates_become_the_replacement_character() -> None:
    assert replace_lone_surrogates("a\ud83db\ude00 \ud83d\ude00\ud83d") == "a\ufffdb\ufffd 😀\ufffd"
