"""The family table says what the code says."""

import family
import pytest

from moesaic.moe.expert_selection import Select, TopK


@pytest.fixture(scope="module")
def page():
    return family.page()


def test_the_table_in_the_docs_is_what_the_code_says(page):
    written = family.PAGE.read_text(encoding="utf-8")
    assert written == page, "docs/family.md is stale: python tools/family.py"


def test_every_member_of_every_family_has_a_row_with_words(page):
    rows = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if "| `" in line[:4]}
    for found in family.families():
        assert family.members(found), found.__name__
        for member in family.members(found):
            cells = rows[member.__name__].split(" | ")
            assert len(cells[2]) > 10, member.__name__
            assert int(cells[4]) > 0


def test_members_of_a_test_or_a_user_are_left_out():
    class Mine(Select):
        """Mine alone."""

    assert TopK in family.members(Select)
    assert Mine not in family.members(Select)


def test_papers_are_links_and_tests_are_found(page):
    row = next(line for line in page.splitlines() if line.startswith("| `TopK`"))
    assert "[1701.06538](https://arxiv.org/abs/1701.06538)" in row
    assert "`moe/test_expert_selection.py`" in row
    assert " laws" in row


def test_lines_of_code_are_neither_blank_nor_comment_nor_docstring():
    class Sample:
        """Two
        lines."""

        # a comment
        x: int = 1

        def f(self) -> int:
            """One."""

            return self.x  # counted

    assert family.lines_of_code(Sample) == 4


def test_a_first_sentence_does_not_end_at_a_number():
    class Sample:
        """Weights below 0.5 go (1701.06538). The rest stays."""

    assert family._first_sentence(Sample) == "Weights below 0.5 go."
