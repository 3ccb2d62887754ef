import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.core.errors import ConfigError
from moesaic.core.units import parse_bytes, show_bytes, show_count, show_flops, show_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1023.9 * 1024, "1.00 MiB"),
     (3 * 2**30, "3.00 GiB"),
     (15.25 * 2**20, "15.2 MiB"), (500 * 2**40, "500 TiB"), (-2048, "-2.00 KiB")],
)  # fmt: skip
def test_bytes_are_shown_in_binary_units(count: float, text: str) -> None:
    assert show_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7"), (999, "999"), (1_230_000, "1.23M"), (54_500_000_000, "54.5B"), (1e12, "1.00T")],
)
def test_counts_are_shown_in_thousands(count: float, text: str) -> None:
    assert show_count(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 FLOP"), (2.5e13, "25.0 TFLOP"), (1e21, "1000 EFLOP")]
)
def test_flops_have_their_unit(count: float, text: str) -> None:
    assert show_flops(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (3e-7, "0.30us"), (4.2e-5, "42.0us"), (0.00421, "4.21ms"), (0.04, "40.0ms"),
     (0.6, "600ms"), (0.9996, "1.0s"), (9.5, "9.5s"), (59.4, "59s"), (59.9, "1m00s"), (75, "1m15s"),
     (3600, "1h00m"), (3661, "1h01m"), (90_000, "25h00m")],
)  # fmt: skip
def test_seconds_are_shown_with_readable_units(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [("6GiB", 6 * 2**30), ("500MB", 500_000_000), ("500 MB", 500_000_000), ("1.5KiB", 1536),
     ("12", 12), (12, 12), ("12B", 12), ("0", 0)],
)  # fmt: skip
def test_sizes_are_read_in_both_bases(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "6 gigs", "-1", "1..2", "6Gi", "."])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size: expected"):
        parse_bytes(text)


@given(st.integers(0, 2**59))
def test_a_shown_size_reads_back_within_its_digits(count: int) -> None:
    assert parse_bytes(show_bytes(count)) == pytest.approx(count, rel=0.005)
