"""Limits of the readers: sizes and depths above which a file is refused.

Far above what texts, catalogues and translation memories have; a file above one of them is damaged,
not text, or made to exhaust memory, so they are checked before memory is taken. Every refusal names
the file, the limit and the way out.
"""

MAX_LINE_BYTES = 16 << 20
"""Bytes of one line of a text file, decompressed."""

MAX_DOCUMENT_BYTES = 8 << 20
"""UTF-8 bytes of one document; a corpus has it on one line, where escapes may double it."""

MAX_EXPANSION = 250
"""Decompressed bytes per compressed byte, beyond FREE_EXPANSION_BYTES; text has 3 to 20."""

FREE_EXPANSION_BYTES = 16 << 20
"""Decompressed bytes that are read whatever the ratio."""

MAX_DICTIONARY_BYTES = 256 << 20
"""Memory of a decompressor; ``xz -9`` needs 65 MiB, ``zstd --long=27`` 128 MiB."""

MAX_CATALOGUE_BYTES = 256 << 20
"""Bytes of a file that is read whole: a gettext catalogue, decompressed."""

MAX_NESTING = 100
"""Depth of nested elements or values in XML and JSON."""

MAX_UNIT_BYTES = 16 << 20
"""Bytes of a translation memory without the end of a unit: its header, or one unit."""

MAX_FORMULA_CHARS = 2000
"""Characters of a catalogue's plural formula; the longest in use has about 200."""

MAX_FORMULA_DEPTH = 50
"""Depth of nested operators in a plural formula."""


def as_size(count: int) -> str:
    """Return a limit in bytes as a person writes it: ``16 MiB``."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size} {unit}"
    return f"{count:,} bytes"
