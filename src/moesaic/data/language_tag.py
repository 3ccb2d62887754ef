"""Language tag: where a row says which language is to be written.

A member names the special tokens around the texts of a row; collators put them there, in training
and in front of an answer alike. Letters: B rows.
"""

from dataclasses import dataclass
from typing import Literal

from moesaic.core.config import Choice

SOURCE_TAG, TARGET_TAG = "source", "target"  # the tags of a row's two languages
TASK_TAG = "task"  # the tag of its task
TASK_PREFIX = "task:"  # of the code of a task among the tags of a vocabulary


@dataclass(frozen=True, slots=True)
class RowFrame:
    """The special tokens of a row by name: a role, ``source`` or ``target``, or one of your own.

    ``source_start`` is before the source text (``eos`` is after it), ``prompt`` before the target
    text. The last ``predicted`` tokens of the prompt are labels as well. A text that is continued
    has ``text_start`` before it instead, if that is not None.
    """

    source_start: tuple[str, ...]
    prompt: tuple[str, ...]
    predicted: int = 0
    text_start: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the end included, each once."""
        return tuple(dict.fromkeys((*self.source_start, *self.prompt, "eos")))

    @property
    def source_specials(self) -> int:
        """The number of special tokens of a source, its end included."""
        return len(self.source_start) + 1


class LanguageTag(Choice):
    """Family of the places of language tags."""

    def frame(self, *, decoder_only: bool) -> RowFrame:
        """Return the special tokens of rows for a model with an encoder, or without one."""
        raise NotImplementedError


class FirstSourceToken(LanguageTag):
    """The target's tag before the source (Johnson et al. 2017, arXiv:1611.04558).

    It starts the target too. A decoder-only row has each text behind the tag of its own language.
    """

    def frame(self, *, decoder_only: bool) -> RowFrame:
        return RowFrame((SOURCE_TAG if decoder_only else TARGET_TAG,), (TARGET_TAG,))


class FirstTargetToken(LanguageTag):
    """The target's tag is the first token that is predicted; decoding forces it.

    The source has the tag of its own language (M2M-100, arXiv:2010.11125; NLLB, arXiv:2207.04672).
    The decoder starts with ``start``.
    """

    start: Literal["eos", "bos", "pad"] = "eos"

    def frame(self, *, decoder_only: bool) -> RowFrame:
        del decoder_only
        return RowFrame((SOURCE_TAG,), (self.start, TARGET_TAG), predicted=1)


class TwoTokenPrompt(LanguageTag):
    """The decoder is given ``start`` and the target's tag, and learns the text alone."""

    start: Literal["eos", "bos", "pad"] = "eos"

    def frame(self, *, decoder_only: bool) -> RowFrame:
        del decoder_only
        return RowFrame((SOURCE_TAG,), (self.start, TARGET_TAG))


class NoTag(LanguageTag):
    """No tag: a model of one direction, or of text. The decoder starts with ``start``.

    ``text``: a text that is continued starts with its own first token (Qwen). Where there is none,
    and between documents in training, it is the end token.
    """

    start: Literal["eos", "bos", "pad", "text"] = "eos"

    def frame(self, *, decoder_only: bool) -> RowFrame:
        del decoder_only
        if self.start == "text":
            return RowFrame((), ("eos",), text_start=())
        return RowFrame((), (self.start,))


class TaskPrompt(LanguageTag):
    """The tag of the task, then that of a language, before each text that a stack begins with.

    It is the first token of its row, so a router that reads the tag (``HiddenStateAndTag``,
    ``TagOnly``) reads the task: task-prompt-guided routing as in JiuZhang 2.0 (2306.11027). The
    tokenizer needs a tag for each task (``data.tokenizer.added_tags``, ``task:NAME``).
    """

    def frame(self, *, decoder_only: bool) -> RowFrame:
        if decoder_only:
            return RowFrame((TASK_TAG, SOURCE_TAG), (TASK_TAG, TARGET_TAG))
        return RowFrame((TASK_TAG, TARGET_TAG), (TARGET_TAG,))
