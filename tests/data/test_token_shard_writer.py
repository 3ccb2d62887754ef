"""Writing token shards: atomic, cached by fingerprint, reproducible."""

import errno
import shutil

import numpy as np
import pytest

import pipeline_cases as cases
from moesaic.core.errors import DataError, UserError
from moesaic.data.token_shard_writer import cached_shards, token_dtype, write_shards


class Broken(cases.ToyCorpus):
    """Fails in the middle of the last direction."""

    def iter_pairs(self, source, target, *, split="train"):
        for n, pair in enumerate(super().iter_pairs(source, target, split=split)):
            if target == "jpn_Jpan" and n == 20:
                raise DataError("line 21 is not UTF-8")
            yield pair


class Empty(cases.ToyCorpus):
    directions = ()

    def iter_texts(self, code, *, split="train"):  # noqa: ARG002
        return iter(())


def test_a_full_disk_is_said_with_the_folder_and_leaves_no_files(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="/shards: token shards cannot be written: no space left"):
        write_shards(cases.ToyCorpus(), cases.tokenizer(), out=tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_shards_where_a_file_is_in_the_way_are_refused_with_a_sentence(tmp_path):
    (tmp_path / "home").write_text("")
    with pytest.raises(UserError, match="token shards cannot be written: not a directory"):
        write_shards(cases.ToyCorpus(), cases.tokenizer(), out=tmp_path / "home/shards")


def test_a_failed_write_leaves_no_files(tmp_path):
    with pytest.raises(DataError, match="line 21"):
        write_shards(Broken(), cases.tokenizer(), out=tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_without_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="no text"):
        write_shards(Empty(), cases.tokenizer(), out=tmp_path / "shards")


def test_shards_are_never_overwritten(tmp_path):
    with pytest.raises(DataError, match="exists already"):
        write_shards(cases.ToyCorpus(), cases.tokenizer(), out=tmp_path)


def test_the_cache_is_written_once_per_corpus_and_tokenizer(tmp_path):
    first = cached_shards(cases.ToyCorpus(), cases.tokenizer(), root=tmp_path)
    written = (first.path / "tokens.bin").stat().st_mtime_ns
    again = cached_shards(cases.ToyCorpus(), cases.tokenizer(), root=tmp_path)
    assert (again.path / "tokens.bin").stat().st_mtime_ns == written
    assert first.path == again.path
    other = cases.ToyCorpus()
    other.fingerprint = "another"
    assert cached_shards(other, cases.tokenizer(), root=tmp_path).path != first.path


def test_writing_twice_gives_the_same_bytes(tmp_path):
    again = write_shards(cases.ToyCorpus(), cases.tokenizer(), out=tmp_path / "again")
    assert again.manifest == cases.shards().manifest


def test_ids_are_stored_in_the_smallest_dtype():
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")
    assert cases.shards().manifest["token_type"] == "<u2"
