"""What an exception is to the user: a sentence, or None if it is a bug and keeps its traceback."""

import typer

from moesaic.core.errors import UserError
from moesaic.core.os_errors import describe_os_error

_USAGE_ERROR = typer.BadParameter.__mro__[1]  # of click, or of the copy that typer has
_CLICK_ERROR = _USAGE_ERROR.__mro__[1]
_MEMORY_WORDS = ("not enough memory", "can't allocate memory", "out of memory")


def sentence_of(error: BaseException) -> str | None:
    """Return the sentence of a UserError, a wrong option, an OSError or too little memory."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, _CLICK_ERROR):
        return _describe_usage(error)
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, MemoryError) or _is_memory_error_of_torch(error):
        first = next(iter(str(error).splitlines()), "")
        return f"there is not enough memory{f': {first}' if first else ''}"
    return None


def _describe_usage(error: BaseException) -> str:
    message = str(error.format_message()).strip().rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
    message = message.replace(": Value error, ", ": ")  # of an enum's member
    context = vars(error).get("ctx")
    hint = f" ({context.command_path} --help)" if context else ""
    return f"{message[:1].lower()}{message[1:]}{hint}"


def _is_memory_error_of_torch(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _MEMORY_WORDS)
