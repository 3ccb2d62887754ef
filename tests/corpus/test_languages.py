import pytest

from moesaic.core.errors import UserError
from moesaic.corpus.languages import (
    all_languages,
    find_language,
    precise_tag,
    resolve_language,
    resolve_locale,
)
from moesaic.corpus.region_scripts import LANGUAGE_OF_REGION, SCRIPT_OF_REGION

CORPUS50 = [
    "ar",
    "bg",
    "bn",
    "ca",
    "cs",
    "da",
    "de",
    "el",
    "es",
    "et",
    "eu",
    "fi",
    "fr",
    "gl",
    "gu",
    "he",
    "hi",
    "hr",
    "hu",
    "id",
    "it",
    "ja",
    "ka",
    "kk",
    "kn",
    "ko",
    "lt",
    "ml",
    "mr",
    "nb",
    "ne",
    "nl",
    "pa",
    "pl",
    "pt_BR",
    "ro",
    "ru",
    "sk",
    "sl",
    "sr",
    "sv",
    "sw",
    "ta",
    "te",
    "th",
    "tr",
    "uk",
    "vi",
    "zh_Hans",
    "zh_Hant",
]


@pytest.mark.parametrize(
    ("spelled", "code"),
    [
        ("deu_Latn", "deu_Latn"),
        ("de", "deu_Latn"),
        ("de-DE", "deu_Latn"),
        ("de_DE.UTF-8", "deu_Latn"),
        ("ger", "deu_Latn"),
        ("DEU", "deu_Latn"),
        ("German", "deu_Latn"),
        ("pt", "por_Latn"),
        ("pt_PT", "por_Latn"),
        ("pt-BR", "por_Latn_BR"),
        ("pt_BR", "por_Latn_BR"),
        ("zh_Hans", "zho_Hans"),
        ("zh_CN", "zho_Hans"),
        ("zh-TW", "zho_Hant"),
        ("sr", "srp_Cyrl"),
        ("sr@latin", "srp_Latn"),
        ("sr_Latn", "srp_Latn"),
        ("fa", "pes_Arab"),
        ("no", "nob_Latn"),
        ("ku", "kmr_Latn"),
        ("es-MX", "spa_Latn"),
    ],
)
def test_every_spelling_of_a_language_resolves_to_its_code(spelled: str, code: str) -> None:
    assert resolve_language(spelled).code == code


def test_a_misspelt_language_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r'unknown language "Germna".*did you mean "German"'):
        resolve_language("Germna")


@pytest.mark.parametrize("variant", ["es_MX", "fr_CA", "ca@valencia", "de_CH", "de_Informal", "x"])
def test_a_catalogue_of_a_variant_is_not_the_main_language(variant: str) -> None:
    assert resolve_locale(variant) is None


@pytest.mark.parametrize("locale", ["fr_FR", "ko_KR", "nb-no", "hy-am", "zh_Hans_CN", "tr_TR"])
def test_a_catalogue_of_the_standard_region_is_the_main_language(locale: str) -> None:
    assert resolve_locale(locale) == resolve_language(locale.replace("-", "_").split("_")[0])


def test_the_fifty_languages_of_the_extract_are_fifty_codes() -> None:
    assert len({resolve_language(name).code for name in CORPUS50}) == 50


def test_codes_and_tags_are_unique_and_resolve_to_themselves() -> None:
    table = all_languages()
    assert len(table) >= 350
    assert len({row.code for row in table}) == len(table) == len({row.bcp47 for row in table})
    for row in table:
        assert resolve_language(row.code) == row
        assert resolve_language(row.bcp47) == row
        assert row.script == row.code.split("_")[1]


@pytest.mark.parametrize(("language", "region"), SCRIPT_OF_REGION)
def test_a_region_that_decides_the_script_is_never_dropped(language: str, region: str) -> None:
    for spelled in (f"{language}-{region}", f"{language}_{region}.UTF-8", f"{language}_{region}"):
        found = find_language(spelled)
        if found is None:  # no row in that script: refused rather than read as another
            assert find_language(f"{language}-{SCRIPT_OF_REGION[language, region]}") is None
        else:
            assert found.script == SCRIPT_OF_REGION[language, region]
    base = find_language(language)
    if base is not None:  # a script that is given decides
        assert resolve_language(f"{language}-{base.script}-{region}") == base


@pytest.mark.parametrize(
    ("spelled", "code"),
    [
        ("zh_HK", "zho_Hant"), ("zh-MO", "zho_Hant"), ("zho-HK", "zho_Hant"), ("zh-SG", "zho_Hans"),
        ("zh-Hans-HK", "zho_Hans"), ("pa-PK", "pan_Arab"), ("pan_PK", "pan_Arab"),
        ("fa-AF", "prs_Arab"), ("fa_IR", "pes_Arab"), ("uz-AF", "uzs_Arab"), ("uz_CN", "uzn_Cyrl"),
        ("az-IR", "azb_Arab"), ("kk-CN", "kaz_Arab"), ("mn-CN", "khk_Mong"), ("sr-ME", "srp_Latn"),
        ("sr-BA", "srp_Cyrl"), ("sd-IN", "snd_Deva"), ("ms-CC", "zsm_Arab"), ("sw-CD", "swc_Latn"),
        ("nan-TW", "nan_Hant"), ("yue-CN", "yue_Hans"), ("zh-yue", "yue_Hant"),
        ("cmn-Hant-HK", "zho_Hant"), ("zh-cmn-Hant", "zho_Hant"), ("zh-CHT", "zho_Hant"),
        ("por-BR", "por_Latn_BR"), ("pt-Latn-BR", "por_Latn_BR"), ("por_Latn-PT", "por_Latn"),
        ("no_NO@nynorsk", "nno_Latn"),
        ("zh-cmn-Hans-CN", "zho_Hans"), ("no-nyn", "nno_Latn"), ("no@nynorsk", "nno_Latn"),
    ],
)  # fmt: skip
def test_a_region_or_subtag_that_is_a_language_or_script_is_kept(spelled: str, code: str) -> None:
    assert resolve_language(spelled).code == code


def test_the_languages_that_are_a_region_of_another_have_rows() -> None:
    for (language, region), code in LANGUAGE_OF_REGION.items():
        assert find_language(f"{language}-{region}") == resolve_language(code)


@pytest.mark.parametrize(
    ("spelled", "code"),
    [
        ("de-CH-1996", "deu_Latn"), ("de-1901", "deu_Latn"), ("ca-valencia", "cat_Latn"),
        ("ca@valencia", "cat_Latn"), ("sr@ijekavian", "srp_Cyrl"), ("be-tarask", "bel_Cyrl"),
        ("sr@ijekavianlatin", "srp_Latn"), ("sr-Latn-ijekavsk", "srp_Latn"), ("es-419", "spa_Latn"),
        ("de-u-co-phonebk", "deu_Latn"), ("en-x-mine", "eng_Latn"), ("sl-rozaj-biske", "slv_Latn"),
    ],
)  # fmt: skip
def test_a_variant_that_keeps_the_script_is_its_language_but_no_catalogue_of_it(
    spelled: str, code: str
) -> None:
    assert resolve_language(spelled).code == code
    assert (
        precise_tag(spelled) == spelled.replace("_", "-").casefold()
        or "-x-" in spelled
        or ("-u-" in spelled)
    )
    if "-x-" not in spelled and "-u-" not in spelled:
        assert resolve_locale(spelled) is None


@pytest.mark.parametrize(
    "spelled",
    ["gsw", "x-notes", "", "-", "de-", "en-deu", "en-fonipa", "ja-hepburn", "zh-Latn-pinyin",
     "de@x", "pi-TH", "score", "i-default", "d" * 10_000, "de-" + "abcde-" * 10_000],
)  # fmt: skip
def test_what_is_no_language_or_in_another_script_is_unknown_in_a_short_sentence(
    spelled: str,
) -> None:
    assert find_language(spelled) is None
    with pytest.raises(UserError, match="unknown language") as error:
        resolve_language(spelled)
    assert len(str(error.value)) < 400


def test_a_precise_tag_is_kept_only_where_it_says_more_than_the_code() -> None:
    assert [precise_tag(x) for x in ("de", "deu_Latn", "German", "pt-BR", "de_AT", "zh-HK")] == [
        "deu_Latn", "deu_Latn", "deu_Latn", "por_Latn_BR", "de-at", "zh-hk"
    ]  # fmt: skip
