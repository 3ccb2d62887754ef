"""Calls of the rendezvous store that end: torch's client has no limit on most of them.

A ``TCPStore`` client waits for the answer of ``get``, ``add``, ``set`` and ``check`` for as long as
the connection is open, and a stopped process (SIGSTOP, a suspended machine) keeps its connections
open. So does a foreign server at the port of the store.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

import torch.distributed as distributed

Result = TypeVar("Result")


class UnansweredError(OSError):
    """A call did not return within its limit. It goes on in its thread, and its result is lost."""


class BoundedCaller:
    """Calls functions one at a time in a thread of its own, each within ``limit_s`` seconds.

    While a call that was given up is still inside its function, every further call is refused at
    once; the caller works again when the function returns.
    """

    def __init__(self, *, limit_s: float, name: str) -> None:
        self.limit_s = limit_s
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._free, self._given_up = Lock(), False
        Thread(target=self._run, daemon=True, name=name).start()

    def __call__(self, function: Callable[[], Result]) -> Result:
        """Return ``function()``. Raises UnansweredError, or what the function raised."""
        if not self._free.acquire(timeout=0.0 if self._given_up else self.limit_s):
            raise UnansweredError(f"no answer to an earlier call within {self.limit_s:.1f} s")
        self._given_up = False
        future: Future[Result] = Future()
        self._calls.put((function, future))
        try:
            return future.result(timeout=self.limit_s)
        except TimeoutError:
            if future.done():
                raise  # the function's own
            self._given_up = True
            raise UnansweredError(f"no answer within {self.limit_s:.1f} s") from None

    def close(self) -> None:
        """End the thread, after the call that it is in."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, future = call
            try:
                future.set_result(function())
            except BaseException as error:  # raised where the result is awaited
                future.set_exception(error)
            self._free.release()


class BoundedStore:
    """The methods of a rendezvous store that the watchdog uses, each within ``limit_s`` seconds.

    ``store`` must be a client of its own: a blocked call of another would delay this one's.
    """

    def __init__(
        self,
        store: distributed.Store,  # pyright: ignore[reportPrivateImportUsage]
        *,
        limit_s: float,
    ) -> None:
        self._store = store
        self._call = BoundedCaller(limit_s=limit_s, name="store calls")

    def set(self, key: str, value: str) -> None:
        self._call(lambda: self._store.set(key, value))

    def add(self, key: str, amount: int) -> int:
        return self._call(lambda: self._store.add(key, amount))

    def read(self, key: str) -> bytes | None:
        """Return the value, or None where no rank has set it."""
        return self._call(lambda: self._store.get(key) if self._store.check([key]) else None)

    def read_all(self, keys: Sequence[str]) -> dict[str, bytes | None]:
        """Return the value of each key, or None. Two messages if every key has one."""
        wanted = list(keys)
        if self._call(lambda: self._store.check(wanted)):
            return dict(zip(wanted, self._call(lambda: self._store.multi_get(wanted)), strict=True))
        return {key: self.read(key) for key in wanted}

    def has(self, key: str) -> bool:
        return self._call(lambda: self._store.check([key]))

    def close(self) -> None:
        """End the thread of the calls."""
        self._call.close()
