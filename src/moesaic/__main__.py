"""Entry point of the process: ``moesaic COMMAND`` and ``python -m moesaic COMMAND``.

Ctrl-C gets its plain answer before anything else is imported; ``main`` then takes over.
"""

import os
import signal


def _end_now(number: int, frame: object) -> None:  # noqa: ARG001
    os._exit(128 + number)


if (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):  # not ignored, as behind a shell's ``&``
    # a worker process that is spawned imports this file too, and has nothing to answer
    signal.signal(signal.SIGINT, signal.SIG_DFL if __name__ == "__mp_main__" else _end_now)

from moesaic.cli.main import main as main  # noqa: E402

if __name__ == "__main__":
    main()
