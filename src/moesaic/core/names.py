"""Names that become names of files and directories: no separator, no dots alone, no control."""

from typing import Annotated

from pydantic import Field

MAX_NAME = 100  # characters; file systems allow 255 bytes

FileName = Annotated[
    str, Field(max_length=MAX_NAME, pattern=r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$")
]
"""A name that stays in the directory it is joined to."""
