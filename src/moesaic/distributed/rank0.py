"""Work on rank 0 whose result or error all ranks receive, however long it takes."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any

from moesaic.core.errors import UserError
from moesaic.distributed.world import World

KEEPALIVE_S = 1.0  # rank 0 broadcasts this often that it is still working


def run_on_rank0(world: World, action: Callable[[], Any]) -> Any:
    """Run ``action`` on rank 0 and return its value (JSON data) on every rank. Collective.

    It may take longer than the timeout of collectives: rank 0 works in a thread and broadcasts that
    it is alive. A UserError is raised on every rank; any other error only on rank 0.
    """
    if world.size == 1:
        return action()
    if world.rank == 0:
        return _run_with_keepalive(world, action)
    while True:
        status = world.broadcast_object(None)
        if status["error"] is not None:
            raise UserError(status["error"])
        if status["done"]:
            return status["value"]


def _run_with_keepalive(world: World, action: Callable[[], Any]) -> Any:
    future: Future[Any] = Future()
    Thread(target=_run_into_future, args=(future, action), daemon=True).start()
    last_sent = time.monotonic()
    while not future.done():
        time.sleep(0.002)
        if time.monotonic() - last_sent > KEEPALIVE_S:
            world.broadcast_object({"done": False, "error": None, "value": None})
            last_sent = time.monotonic()
    error = future.exception()
    if error is None:
        world.broadcast_object({"done": True, "error": None, "value": future.result()})
        return future.result()
    if isinstance(error, UserError):
        world.broadcast_object({"done": True, "error": str(error), "value": None})
    raise error


def _run_into_future(future: Future[Any], action: Callable[[], Any]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)
