"""Wheels with tiny data files, in the place where the package cache looks for them."""

import gzip
import zipfile
from pathlib import Path

import numpy as np

from moesaic.data.series import PACKAGED_FILES

METADATA = "Metadata-Version: 2.1\nName: x\nVersion: 1\nLicense-Expression: BSD-3-Clause\n\n"
MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]


def write_packages(home: Path) -> None:
    """Write a wheel for every package with series, and one with 40 digits."""
    files: dict[tuple[str, str], dict[str, str]] = {}
    for file in PACKAGED_FILES:
        key = (file.package.name, file.package.version)
        files.setdefault(key, {})[file.path] = _table(file.layout, file.columns)
    digits = "\n".join(",".join(["0", "16"] * 32 + [str(n % 10)]) for n in range(40))
    files["scikit-learn", "1.9.1"] = {"sklearn/datasets/data/digits.csv.gz": digits}
    folder = home / "packages" / "pypi"
    folder.mkdir(parents=True)
    for (name, version), members in files.items():
        plain = name.replace("-", "_")
        with zipfile.ZipFile(folder / f"{plain}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{plain}-{version}.dist-info/METADATA", METADATA)
            for path, text in members.items():
                wheel.writestr(path, gzip.compress(text.encode()) if path[-2:] == "gz" else text)


def _table(layout: str, columns: tuple[str, ...]) -> str:
    columns = tuple(MONTHS) if layout == "months" else columns
    values = np.arange(30)[:, None] + np.arange(len(columns))
    rows = [[str(value) for value in row] for row in values]
    rows[4][-1] = ""  # a missing point
    if layout == "columns":
        columns, rows = ("number", *columns), [["0", *row] for row in rows]
    if layout == "groups":
        rows = [[f"group {i % 2}", *row[1:]] for i, row in enumerate(rows)]
    return "\n".join(",".join(row) for row in [list(columns), *rows])
