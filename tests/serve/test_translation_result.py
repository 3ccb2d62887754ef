from moesaic.serve.translation_result import TranslationResult, describe_results


def test_what_became_of_lines_is_said_with_their_numbers():
    plain = TranslationResult(text="a", score=0.0)
    cut = TranslationResult(text="a", score=0.0, finished=False, repeats=True)
    split = TranslationResult(text="a", score=0.0, parts=3, forced_cuts=1)
    short = TranslationResult(text="a", score=0.0, truncated=True)
    assert list(describe_results([plain, plain])) == []
    sentences = list(describe_results([plain, cut, split, short, *[cut] * 9]))
    assert [text for text in sentences if "length limit" in text] == [
        "lines 2, 5, 6, 7, 8, 9, 10, 11 and 2 more (10 of 13): the translation was cut off at the "
        "length limit"
    ]
    for word in (
        "in parts and joined",
        "end of a sentence",
        "only the beginning",
        "again and again",
    ):
        assert sum(word in text for text in sentences) == 1
    assert any(text.startswith("line 3 (1 of 13): ") for text in sentences)
