"""Make tiny catalogues, wheels, debs and archives for the tests of the corpus package."""

import bz2
import gzip
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import zstandard


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".bz2":
        return bz2.compress(data)
    if suffix == ".xz":
        return lzma.compress(data)
    return zstandard.ZstdCompressor().compress(data) if suffix == ".zst" else data


def mo_bytes(messages: Mapping[bytes, bytes], order: str = "<") -> bytes:
    """Write a .mo file: the layout of GNU gettext's manual."""
    items = sorted(messages.items())
    tables = 28 + 16 * len(items)
    sources, targets, text, at = b"", b"", b"", tables
    for column in (0, 1):
        for item in items:
            row = struct.pack(f"{order}2I", len(item[column]), at)
            sources, targets = (sources + row, targets) if column == 0 else (sources, targets + row)
            text += item[column] + b"\0"
            at += len(item[column]) + 1
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(items), 28, 28 + 8 * len(items), 0, 0)
    return head + sources + targets + text


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, bytes]) -> Path:
    """Write a wheel that holds ``files`` and says its licence."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, data in files.items():
            archive.writestr(inside, data)
        meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: BSD-3-Clause\n"
        archive.writestr(f"{name.replace('-', '_')}-{version}.dist-info/METADATA", meta)
    return path


def deb_bytes(files: Mapping[str, bytes], suffix: str = ".xz") -> bytes:
    """Write a .deb: an ar archive of version, control and data."""
    held = BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    pack = {".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress, "": bytes}[suffix]
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        f"data.tar{suffix}": pack(held.getvalue()),
    }
    out = b"!<arch>\n"
    for name, data in parts.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    """Write a zip archive, as a language pack is one."""
    held = BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return held.getvalue()
