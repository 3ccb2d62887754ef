"""The table of tiles is complete, and a choice depends on shapes only."""

import json

import pytest
import torch

from moesaic.ops.triton.tiles import (
    REGIMES,
    ROW_TILE_OPS,
    TABLE,
    WEIGHT_GRADIENT_OPS,
    gpu_architecture,
    load_table,
    parse_table,
    regime,
    tiles_for,
    to_numbers,
)

RAW = json.loads(TABLE.read_text())


def test_every_entry_of_the_table_has_every_product():
    for kinds in load_table().values():
        for regimes in kinds.values():
            assert set(regimes) == set(REGIMES)
            for tiles in regimes.values():
                assert set(tiles) == {*ROW_TILE_OPS, *WEIGHT_GRADIENT_OPS}


def test_a_tile_is_written_as_it_is_read():
    table = load_table()
    for card, kinds in RAW.items():
        for kind, regimes in kinds.items():
            for name, ops in regimes.items():
                written = {op: to_numbers(tile) for op, tile in table[card][kind][name].items()}
                assert written == ops


def test_products_that_share_a_schedule_must_share_their_rows():
    raw = json.loads(TABLE.read_text())
    raw["any"]["half"]["many"]["down"][0] = 64
    with pytest.raises(ValueError, match="any half many: up, down"):
        parse_table(raw)


@pytest.mark.parametrize(("edges", "name"), [(8, "few"), (2048, "few"), (2049, "some"),
                                             (8192, "some"), (8193, "many")])  # fmt: skip
def test_a_regime_depends_on_rows_per_expert(edges, name):
    assert regime(edges=edges, experts=128) == name


def test_a_card_without_an_entry_takes_the_tiles_of_any():
    shape = {"edges": 10_000, "experts": 4}
    old = tiles_for(**shape, dtype=torch.bfloat16, architecture="sm70")
    assert old == load_table()["any"]["half"]["many"]
    assert tiles_for(**shape, dtype=torch.bfloat16, architecture="sm90") != old
    single = tiles_for(**shape, dtype=torch.float32, architecture="sm90")
    assert single == load_table()["any"]["single"]["many"]
    assert gpu_architecture(torch.device("cpu")) == "any"
