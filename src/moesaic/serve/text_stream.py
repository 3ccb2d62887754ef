"""Text stream: generated tokens to text as they come, never a part of a character, up to a stop.

A character of several bytes may be spread over several tokens, and a stop string over any number of
them; what a later token could still change or cut is held back.
"""

from collections.abc import Sequence

from moesaic.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what bytes that are no whole character are decoded to
_MAX_HELD = 8  # tokens after which such bytes are taken to be wrong rather than incomplete
_CONTEXT = 16  # tokens of the prompt that the first tokens are decoded behind


class TextStream:
    """The text of one answer; ``add`` takes its tokens in order and returns what is certain.

    The pieces that ``add`` and ``finish`` return, joined, are the text before the stop string that
    is complete first (of several that end at once, the longest).
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(filter(None, stop))
        # decoded behind a few tokens: a space at the beginning of a text is left out in decoding
        self._ids = list(prompt[-_CONTEXT:])
        while len(self._ids) < len(prompt) and self._decode(self._ids).startswith(_INCOMPLETE):
            self._ids = list(prompt[-len(self._ids) - _CONTEXT :])
        self._shown = len(self._ids)  # tokens whose text was taken
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that is certain after another token; empty once a stop was found."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """Return the rest of the text: no token follows."""
        if self.stopped:
            return ""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        """Return the text of the tokens that were not taken yet, if it is whole characters."""
        text, before = self._decode(self._ids), self._decode(self._ids[: self._shown])
        incomplete = text.endswith(_INCOMPLETE) and len(self._ids) - self._shown < _MAX_HELD
        if incomplete and not final:
            return ""
        # the tokens taken last stay in front of the next ones
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text[len(before) :]

    def _release(self, text: str, *, final: bool) -> str:
        """Return what of the held and the new text cannot be part of a stop string."""
        self._held += text
        found = [(self._held.find(word), word) for word in self._stop if word in self._held]
        if found:
            self.stopped = True
            at, _ = min(found, key=lambda each: (each[0] + len(each[1]), each[0]))
            certain, self._held = self._held[:at], ""
            return certain
        keep = 0 if final else max((self._overlap(word) for word in self._stop), default=0)
        at = len(self._held) - keep
        certain, self._held = self._held[:at], self._held[at:]
        return certain

    def _overlap(self, word: str) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        most = min(len(self._held), len(word) - 1)
        return next((n for n in range(most, 0, -1) if self._held.endswith(word[:n])), 0)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)
