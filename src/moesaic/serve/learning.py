"""Learning: how each kept checkpoint of a run routes the same held-out text."""

from collections.abc import Sequence
from pathlib import Path

from moesaic.checkpoint.load import read_weights
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.publish import list_checkpoints
from moesaic.checkpoint.routes import RoutesWriter
from moesaic.checkpoint.rundir import RunDir
from moesaic.core.errors import CheckpointError
from moesaic.evaluate.testset import TestSet
from moesaic.model.weights import restore_weights
from moesaic.serve.routes import translation_routes
from moesaic.serve.translator import Translator


def trace_checkpoints(path: Path | str, *, tests: Sequence[TestSet]) -> list[Path]:
    """Write the routes of each kept checkpoint on ``tests``, in the place of those that were there.

    Returns the files, by step. Raises CheckpointError if no checkpoint is left.
    """
    run, translator = RunDir.open(Path(path)), Translator.open(path)
    kept = {read_manifest(folder).step: folder for folder in list_checkpoints(run.checkpoints)[::-1]}
    if not kept:
        raise CheckpointError(f"{run.checkpoints}: no checkpoint is left to look at")
    written = []
    for step, folder in sorted(kept.items()):
        restore_weights(translator.model, read_weights(folder))
        out = run.routing_snapshots / f"step-{step:08d}.routes"
        about = {"run": run.path.resolve().name, "step": step}
        with RoutesWriter(out, languages=translator.languages, about=about) as writer:
            for test in tests:
                for routes in translation_routes(
                    translator,
                    test.sources,
                    translations=test.references,
                    source=test.source,
                    target=test.target,
                ):
                    writer.add(routes)
        written.append(out)
    for old in run.routing_snapshots.glob("step-*.routes"):  # other text, so not to be compared with these
        if old not in written:
            old.unlink()
    return written
