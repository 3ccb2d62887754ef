from pathlib import Path

from moesaic.corpus.dropped_rows import (
    DROPPED_FILE,
    MAX_PER_REASON,
    DroppedRow,
    DroppedRows,
    read_dropped,
)


def test_rows_are_cut_as_they_are_added_so_that_long_texts_take_no_memory(tmp_path: Path) -> None:
    found, again = DroppedRows(), DroppedRows()
    found.add(DroppedRow("eng_Latn-deu_Latn", "too_long", "a" * 10**6, "b\t" * 10**6, "o.tsv"))
    assert sum(map(len, (found.rows[0].source, found.rows[0].target))) < 1000
    again.add_all(found.rows)  # as the rows of a file join those of a corpus
    assert again.rows == found.rows
    found.write(tmp_path / DROPPED_FILE)
    assert list(read_dropped(tmp_path)) == found.rows


def test_of_a_direction_and_reason_the_first_rows_are_kept() -> None:
    found = DroppedRows()
    for number in range(2 * MAX_PER_REASON):
        found.add(DroppedRow("eng_Latn-deu_Latn", "empty", str(number)))
    found.add(DroppedRow("eng_Latn-deu_Latn", "broken", "x"))
    assert [row.source for row in found.rows] == [*map(str, range(MAX_PER_REASON)), "x"]
