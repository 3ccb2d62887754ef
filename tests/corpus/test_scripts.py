import pytest

from moesaic.corpus.languages import all_languages
from moesaic.corpus.scripts import count_letters, is_known_script, script_classes, script_share


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Größe ändern", "Latn"),
        ("Сохранить файл", "Cyrl"),
        ("फ़ाइल सहेजें", "Deva"),
        ("ファイルを保存", "Jpan"),
        ("保存文件", "Hans"),
        ("파일 저장", "Hang"),
        ("حفظ الملف", "Arab"),
        ("บันทึกไฟล์", "Thai"),
    ],
)
def test_a_text_is_in_its_own_script_and_not_in_another(text: str, script: str) -> None:
    assert script_share(text, script=script) == 1.0
    assert script_share(text, script="Grek") == 0.0


def test_vowel_signs_count_as_letters() -> None:
    assert count_letters(script_classes("की %1")) == 2


def test_the_fast_path_for_ascii_equals_the_general_one() -> None:
    text = "".join(chr(i) for i in range(128))
    assert script_classes(text) == script_classes(text + "é")[:-1]


def test_the_scripts_of_most_languages_are_known() -> None:
    stated = [row.script for row in all_languages() if row.script != "Zyyy"]  # undetermined
    unknown = {script for script in stated if not is_known_script(script)}
    assert len(unknown) <= 2, unknown
