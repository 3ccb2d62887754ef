from pathlib import Path

import pytest
import yaml

from moesaic.core.errors import ConfigError, UserError
from moesaic.planner.machine import Machine, SizedRate, find_machine, machine_names, read_machine


def _leaves(value: object, path: str = "") -> list[tuple[str, object]]:
    if not isinstance(value, dict):
        return [(path, value)]
    return [leaf for k, inner in value.items() for leaf in _leaves(inner, f"{path}.{k}".strip("."))]


@pytest.mark.parametrize("name", machine_names())
def test_every_number_of_a_shipped_machine_has_a_source(name: str):
    leaves = dict(_leaves(find_machine(name).to_dict()))
    for path in leaves:
        if path.endswith((".value", ".points")):
            assert leaves[path.rpartition(".")[0] + ".source"], path


@pytest.mark.parametrize(
    "path", ["disk_read.latency_s", "contended.copy_copy", "products.bfloat16.grouped", "update"]
)
def test_a_machine_file_without_a_number_is_refused_by_its_name(path: str, tmp_path: Path):
    written = find_machine("h100").to_dict()
    here: dict = written
    *steps, last = path.split(".")
    for step in steps:
        here = here[step]
    del here[last]
    file = tmp_path / "machine.yaml"
    file.write_text(yaml.safe_dump(written))
    with pytest.raises(ConfigError) as refused:
        read_machine(file)
    assert path in str(refused.value)
    assert "moesaic calibrate" in str(refused.value)


def test_a_machine_file_reads_back_as_it_was_written(tmp_path: Path):
    machine = find_machine("gh200")
    file = tmp_path / "mine.yaml"
    file.write_text(machine.to_yaml())
    assert find_machine(str(file)) == machine


def test_an_unknown_machine_is_answered_with_those_that_ship():
    with pytest.raises(UserError, match='did you mean "h100"'):
        find_machine("h10")
    with pytest.raises(ConfigError, match=r"products\.float8 is missing"):
        find_machine("h100").products_of("float8")


def test_a_larger_call_never_takes_less_time():
    noisy = SizedRate(points=((1.0, 1.0), (10.0, 100.0), (100.0, 50.0)), source="made up")
    times = [noisy.seconds(size) for size in (0.5, 1, 5, 10, 50, 100, 1000)]
    assert times == sorted(times)
    assert times[0] == times[1]  # the cost of a call
    assert noisy.seconds(1000) == pytest.approx(1000 / 50)
    assert noisy.seconds(0) == 0
    with pytest.raises(ConfigError, match="order of their sizes"):
        SizedRate(points=((2.0, 1.0), (1.0, 1.0)), source="made up")


def test_a_link_is_that_of_the_node_or_between_nodes():
    machine: Machine = find_machine("h100")
    assert machine.within_node.bytes_per_s.value > machine.between_nodes.bytes_per_s.value
