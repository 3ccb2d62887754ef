import os
from pathlib import Path

import pytest

from moesaic.core.errors import UserError
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.read_sources import map_in_order
from moesaic.corpus.split import DropNearDuplicates, KeepNearDuplicates, digest64, find_leaks


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs_and_errors_as_they_are(workers: int) -> None:
    assert list(map_in_order(abs, [-3, 1, -2, 0], workers=workers)) == [3, 1, 2, 0]
    with pytest.raises(UserError, match='unknown language "nowhere"'):
        list(map_in_order(resolve_language, ["de", "nowhere"], workers=workers))


def test_a_killed_worker_process_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"killed a worker process.*--workers 1"):
        list(map_in_order(os._exit, [1, 1], workers=2))


def test_held_out_keys_equal_or_near_to_train_keys_are_found(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    lines = [
        "hopen the file",
        "topen the files",
        "hclose it",
        "tclose it",
        "hfar away",
        "tclose it",
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    found = find_leaks(path, near_duplicates=DropNearDuplicates(threshold=0.6))
    assert found.exact == {digest64("close it")}
    assert found.near == {digest64("open the file")}
    kept = find_leaks(path, near_duplicates=KeepNearDuplicates())
    assert (kept.exact, kept.near) == (found.exact, frozenset())
