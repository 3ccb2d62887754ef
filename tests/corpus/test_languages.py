import pytest

from moesaic.core.errors import UserError
from moesaic.corpus.languages import all_languages, resolve_language, resolve_locale

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
