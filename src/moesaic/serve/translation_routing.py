"""Routing of translations: the experts of each token of a text and of its translation.

A finished translation is read again with teacher forcing. This routes each token as generation did
if routing depends only on the token and the tokens before it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moesaic.checkpoint.checkpoint_directory import list_checkpoints
from moesaic.checkpoint.full_checkpoint import read_weights
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.routes_file import RoutesWriter
from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import CheckpointError
from moesaic.evaluate.routing_analysis import record_routes
from moesaic.evaluate.testset import TestSet
from moesaic.model.weights import restore_weights
from moesaic.moe.routing_record import LayerRoutes
from moesaic.serve.translator import Translator

BatchRouting = tuple[LayerRoutes, ...]
CHUNK = 256  # sentences per batch


def translation_routes(
    translator: Translator,
    texts: Sequence[str],
    *,
    translations: Sequence[str],
    source: str,
    target: str,
) -> Iterator[BatchRouting]:
    """Yield the routing of up to ``CHUNK`` texts at a time, in order, without empty texts."""
    pairs = [(a, b) for a, b in zip(texts, translations, strict=True) if translator.normalise(a)]
    for start in range(0, len(pairs), CHUNK):
        sources, targets = zip(*pairs[start : start + CHUNK], strict=True)
        batch = translator.batch(sources, targets=targets, source=source, target=target)
        yield record_routes(translator.model, batch)


def test_set_routing(translator: Translator, tests: Sequence[TestSet]) -> Iterator[BatchRouting]:
    """Yield the routing of the sources and references of test sets."""
    for test in tests:
        yield from translation_routes(
            translator,
            test.sources,
            translations=test.references,
            source=test.source,
            target=test.target,
        )


def trace_checkpoints(path: Path | str, *, tests: Sequence[TestSet]) -> list[Path]:
    """Write the routing of ``tests`` by each kept checkpoint of a run; replaces earlier files.

    Returns the files, by step. Raises CheckpointError if there is no checkpoint.
    """
    run, translator = RunDir.open(Path(path)), Translator.open(path)
    by_step = {read_manifest(c).step: c for c in reversed(list_checkpoints(run.checkpoints))}
    if not by_step:
        raise CheckpointError(f"{run.checkpoints}: there is no checkpoint")
    written = []
    for step, checkpoint in sorted(by_step.items()):
        restore_weights(translator.model, read_weights(checkpoint))
        out = run.routing_snapshots / f"step-{step:08d}.routes"
        about = {"run": run.path.resolve().name, "step": step}
        with RoutesWriter(out, languages=translator.languages, about=about) as writer:
            for batch in test_set_routing(translator, tests):
                writer.add(batch)
        written.append(out)
    for old in set(run.routing_snapshots.glob("step-*.routes")) - set(written):
        old.unlink()  # routing of other text cannot be compared with these
    return written
