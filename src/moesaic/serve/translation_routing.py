"""Routes of translations: a text and what it became are read again, both sides at once.

Reading a finished translation routes each token as writing it did, where routing depends on the
token and what came before it alone.

Learning: how each kept checkpoint of a run routes the same held-out text.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moesaic.checkpoint.checkpoint_directory import list_checkpoints, read_manifest
from moesaic.checkpoint.full_checkpoint import read_weights
from moesaic.checkpoint.routes_file import RoutesWriter
from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import CheckpointError
from moesaic.evaluate.routing_analysis import record_routes
from moesaic.evaluate.testset import TestSet
from moesaic.model.weights import restore_weights
from moesaic.moe.routing_record import LayerRoutes
from moesaic.serve.translator import Translator

CHUNK = 256  # sentences read at a time


def translation_routes(
    translator: Translator,
    texts: Sequence[str],
    *,
    translations: Sequence[str],
    source: str,
    target: str,
) -> Iterator[tuple[LayerRoutes, ...]]:
    """Yield the routes of up to ``CHUNK`` texts at a time, in order; empty ones have none."""
    pairs = [(a, b) for a, b in zip(texts, translations, strict=True) if a.strip()]
    for start in range(0, len(pairs), CHUNK):
        sources, targets = zip(*pairs[start : start + CHUNK], strict=True)
        batch = translator.batch(sources, targets=targets, source=source, target=target)
        yield record_routes(translator.model, batch)


def trace_checkpoints(path: Path | str, *, tests: Sequence[TestSet]) -> list[Path]:
    """Write the routes of each kept checkpoint on ``tests``, in the place of those that were there.

    Returns the files, by step. Raises CheckpointError if no checkpoint is left.
    """
    run, translator = RunDir.open(Path(path)), Translator.open(path)
    kept = {
        read_manifest(folder).step: folder for folder in list_checkpoints(run.checkpoints)[::-1]
    }
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
    for old in run.routing_snapshots.glob(
        "step-*.routes"
    ):  # other text, so not to be compared with these
        if old not in written:
            old.unlink()
    return written
