import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_damage import damaged_json

import pipeline_cases as cases
from moesaic.core.errors import DataError, UserError
from moesaic.data.shards_manifest import DATA_FILES, MANIFEST
from moesaic.data.token_shards import TokenShards


def copied(root: Path, *, without: str) -> Path:
    for path in cases.shards().path.iterdir():
        if path.name != without:
            os.link(path, root / path.name)
    return root


@settings(max_examples=120, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_is_read_or_refused_with_a_sentence(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    root = copied(tmp_path_factory.mktemp("shards"), without=MANIFEST)
    written = json.loads((cases.shards().path / MANIFEST).read_text())
    (root / MANIFEST).write_bytes(data.draw(damaged_json(written)))
    with suppress(UserError):
        cases.read_every_row(TokenShards.open(root))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    name=st.sampled_from(DATA_FILES), place=st.floats(0, 1), odd=st.binary(min_size=8, max_size=8)
)
def test_altered_data_are_read_or_refused_with_a_sentence(
    name: str, place: float, odd: bytes, tmp_path_factory: Any
) -> None:
    root = copied(tmp_path_factory.mktemp("shards"), without=name)
    content = bytearray((cases.shards().path / name).read_bytes())
    start = int(place * (len(content) - 8))
    content[start : start + 8] = odd
    (root / name).write_bytes(content)
    with suppress(UserError):
        cases.read_every_row(TokenShards.open(root))


def test_a_link_out_of_the_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    root = copied(tmp_path / "shards", without="tokens.bin")
    (root / "tokens.bin").symlink_to(cases.shards().path / "tokens.bin")
    with pytest.raises(DataError, match="leads out of"):
        TokenShards.open(root)
