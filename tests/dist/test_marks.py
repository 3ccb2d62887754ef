"""Marks: what a book says is what was last written, also when its writer was killed."""

import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from moesaic.dist.marks import ALL, Book, Mark, read_book


def _write(book: Book) -> None:
    book.at("forward", step=7)
    book.enter("all_reduce", group=ALL)
    book.leave()
    book.enter("all_to_all", group="experts")
    book.leave()
    book.at("sum of gradients")
    book.enter("all_reduce", group=ALL)


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
def test_a_book_says_what_was_last_written(kept: str, tmp_path: Path) -> None:
    book = Book(tmp_path / "book" if kept == "in a file" else None)
    assert book.read() == Mark(counts={})
    _write(book)
    mark = book.read()
    assert (mark.op, mark.group, mark.number, mark.inside) == ("all_reduce", ALL, 2, True)
    assert mark.counts == {ALL: 2, "experts": 1}
    assert mark.collective == "all_reduce #2 (step 7, sum of gradients)"
    assert (mark.came_to("experts"), mark.came_to("nobody")) == (1, 0)
    book.leave()
    assert not book.read().inside
    assert book.read().serial == mark.serial + 1


def _write_and_die(path: Path) -> None:
    _write(Book(path))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_its_last_mark(tmp_path: Path) -> None:
    writer = get_context("fork").Process(target=_write_and_die, args=(tmp_path / "book",))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    mark = read_book(tmp_path / "book")
    assert mark is not None
    assert mark.collective == "all_reduce #2 (step 7, sum of gradients)"
    assert mark.inside


def test_many_groups_and_long_names_fit(tmp_path: Path) -> None:
    book = Book()
    for index in range(300):
        book.enter("a" * 99, group=f"{index}-{'g' * 99}")
        book.leave()
    assert 100 < len(book.read().counts or {}) < 300, "those beyond the last share its place"
    assert read_book(tmp_path / "none") is None


def test_a_closed_book_leaves_no_file(tmp_path: Path) -> None:
    book = Book(tmp_path / "book")
    book.close()
    assert list(tmp_path.iterdir()) == []
