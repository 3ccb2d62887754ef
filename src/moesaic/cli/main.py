"""Command-line entry point: ``moesaic COMMAND`` imports and runs that command's module.

Exit codes: 0 done; 1 a bug, or a check that failed; 2 a mistake of the user or an error of the
operating system, said in a sentence; 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

# Ctrl-C is answered from the first line of ``main`` on: nothing slow is imported before it.
import contextlib
import importlib
import json
import sys
from collections.abc import Sequence

from moesaic.cli.deferred_imports import CommandImports
from moesaic.cli.interrupts import EXIT_CODE, InterruptHandler, stop_message
from moesaic.cli.standard_streams import (
    discard_stdout,
    is_reader_gone,
    named_stdout,
    prepare_standard_streams,
)

COMMANDS = {
    "demo": "data, training, scores and report in ten minutes",
    "train": "train a recipe or a config file; resume a run",
    "launch": "write a job file for many machines: SLURM, Kubernetes, SkyPilot, torchrun",
    "translate": "translate lines with a trained run",
    "generate": "continue a text with a trained language model",
    "eval": "score a run on held-out strings or on your own test set",
    "curve": "score every kept checkpoint of a run",
    "compare": "compare runs: scores, overlaid curves, config differences",
    "ckpt": "inspect, compare, verify and reshard checkpoints",
    "routes": "show, count and compare recorded routing",
    "import": "read a model of Hugging Face transformers",
    "export": "write a model in the files of transformers",
    "verify": "check that a config trains the same under every parallel plan",
    "explain": "parameters, FLOPs and memory of a config, before anything runs",
    "plan": "the fastest parallel plan, memory tiers and micro-batch on a cluster",
    "fit": "the scaling law of your own runs",
    "calibrate": "measure this machine for plan: products, memory, links, disk",
    "scale": "memory and communication of each rank under a parallel plan",
    "data": "build and inspect corpora",
    "report": "write the HTML report of a run",
    "bench": "benchmark a layer beside dense layers and other libraries",
    "config": "list recipes and presets; print, compare and upgrade configs; JSON Schema",
    "doctor": "hardware, versions, and the selected implementation of each op",
}


RENAMED_OPTIONS = {
    ("ckpt", "--ranks"): "--shards",
    ("ckpt", "--whole"): "--full",
    ("launch", "--fewest-nodes"): "--min-nodes",
    ("launch", "--on"): "--launcher",
    ("launch", "--restarts"): "--max-restarts",
    ("launch", "--run"): "--run-dir",
    ("scale", "--mixed"): "--set precision=BFloat16",
    ("scale", "--mixed-precision"): "--set precision=BFloat16",
    ("scale", "--rehearse"): "--dry-run",
    ("scale", "--rows"): "--micro-batch",
    ("scale", "--world"): "--world-size",
    ("verify", "--world"): "--world-size",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Without ``arguments`` it is that of the command line, and the process ends.

    Raises SystemExit at the end of a command.
    """
    owns_process = arguments is None
    imports = CommandImports()
    with InterruptHandler(owns_process=owns_process, has_begun=lambda: imports.finished) as ctrl_c:
        prepare_standard_streams()
        words = list(sys.argv[1:] if arguments is None else arguments)
        try:
            with imports if owns_process else contextlib.nullcontext():
                code = _run(words)
            with named_stdout():
                sys.stdout.flush()
            if ctrl_c.received and code == EXIT_CODE:  # the command was ended by KeyboardInterrupt
                stop_message()
        except KeyboardInterrupt:
            code = _stopped()
        except SystemExit:
            raise
        except BaseException as error:
            # Ctrl-C may come out of an extension module as another error
            code = _stopped() if ctrl_c.received else _report(error, words)
    if code is not None:
        sys.exit(code)


def _run(words: list[str]) -> int | None:
    if not words or words[0] in ("--help", "-h", "help"):
        if len(words) < 2 or words[0] != "help":
            _show_commands()
            return None
        words = [words[1], "--help"]
    if words[0] in ("--version", "-V"):
        version = importlib.import_module("moesaic.core.version").__version__
        sys.stdout.write(f"moesaic {version}\n")
        return None
    command, *rest = words
    _check_names(command, rest)
    module = importlib.import_module(f"moesaic.cli.{command}_command")
    return module.app.run(rest, prog_name=f"moesaic {command}")


def _check_names(command: str, rest: list[str]) -> None:
    errors = importlib.import_module("moesaic.core.errors")
    if command not in COMMANDS:
        hint = errors.did_you_mean(command, COMMANDS)
        raise errors.UserError(f'unknown command "{command}"{hint} (moesaic --help lists them)')
    for word in rest:
        old = word.partition("=")[0]
        if (command, old) in RENAMED_OPTIONS:
            new = RENAMED_OPTIONS[command, old]
            raise errors.UserError(f"{command}: the option {old} is now called {new}")


def _report(error: BaseException, words: Sequence[str]) -> int:
    """Print an error of the user or of the system as a sentence; raise any other."""
    if isinstance(error, BrokenPipeError) and is_reader_gone():  # e.g. ``| head`` has enough
        discard_stdout()
        return 0
    sentence = importlib.import_module("moesaic.cli.error_sentences").sentence_of(error)
    if sentence is None:
        raise error
    output = importlib.import_module("moesaic.cli.shared_options")
    with contextlib.suppress(OSError):
        output.show_error(sentence)
    try:
        if "--json" in words:
            sys.stdout.write(json.dumps({"error": sentence}, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    except OSError:
        discard_stdout()
    return 2


def _stopped() -> int:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        stop_message()
    return EXIT_CODE


def _show_commands() -> None:
    importlib.import_module("moesaic.cli.shared_options").show_commands(COMMANDS)
