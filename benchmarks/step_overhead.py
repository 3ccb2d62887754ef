"""What our trainer costs over a raw loop of the same model, and how long it waits for data.

The raw loop is what one would write by hand: forward, loss, backward, torch's clip, torch's fused
AdamW, on batches that lie ready. Ours is ``Trainer.advance`` with every standard hook, on the real
loader, logging as a run does. Both train the same model on the same batches in one process, in
short blocks that take turns, so that whatever else the machine does hits both. The ratio of each
pair of blocks is one observation; the median counts. ``cpu`` counts the seconds of all threads of
the process, the loader's included: what remains true on a busy machine.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/step_overhead.py
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support import write_result
from torch import nn

from moesaic.checkpoint.run_directory import RunDir
from moesaic.data.batch import Batch
from moesaic.data.mixture import MixtureConfig, WeightedTask
from moesaic.data.tasks import Denoising, Translation
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.distributed.world import SingleProcess
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.config import MoE
from moesaic.monitor.metric_writers import JsonlWriter
from moesaic.monitor.progress_display import RunStatus
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.nn.norm import LayerNorm
from moesaic.testing.tiny_models import change_text, synthetic_run, text_of
from moesaic.train.corpus_source import CorpusSource, NamedCorpus
from moesaic.train.run import LogConfig, Run, ValidationConfig
from moesaic.train.run_training import make_trainer, standard_hooks
from moesaic.train.trainer import Trainer
from moesaic.train.training_data import Preparation
from moesaic.train.training_hooks import Hook, no_progress
from moesaic.train.training_hooks import MetricsLogHook as LogHook

WARM = 5


def the_run(corpus: CorpusSource, *, steps: int) -> Run:
    """A small mixture of experts as the demo trains one."""
    model = ModelConfig(
        vocab_size=4000,
        dim=192,
        encoder=Stack(layers=4),
        decoder=Stack(layers=2),
        attention=AttentionConfig(heads=4),
        feed_forward=FeedForwardConfig(hidden=384, activation=ReLU()),
        moe=MoE(experts=8),
        norm=LayerNorm(),
    )
    both = (WeightedTask(task=Translation()), WeightedTask(task=Denoising(), weight=0.5))
    base = synthetic_run()
    return change_text(
        base,
        corpus=corpus,
        tokenizer=TrainedTokenizer(vocab_size=4000),
        mixture=MixtureConfig(tasks=both, temperature=2.0),
        loader=text_of(base).loader.replace(
            batch_tokens=4096, max_source=96, max_target=96, bucket_window=8192
        ),
        model=model,
        steps=steps,
        validation=ValidationConfig(every=0),
        log=LogConfig(every=10, routing_stats_every=10),
    )


@dataclass(frozen=True)
class Spent:
    """Seconds on the wall, and of all threads of this process on a core."""

    wall: float
    cpu: float


class Clock:
    """Starts when made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def spent(self) -> Spent:
        return Spent(time.perf_counter() - self._wall, time.process_time() - self._cpu)


class Ours:
    """The trainer with its hooks."""

    def __init__(self, trainer: Trainer, hooks: list[Hook]) -> None:
        self.trainer, self.hooks = trainer, hooks
        self.waited = 0.0

    def block(self, steps: int) -> Spent:
        clock = Clock()
        for _ in range(steps):
            report = self.trainer.train_step()
            self.waited += report.data_seconds
            for hook in self.hooks:
                hook.after_step(self.trainer, report)
        return clock.spent()


class Raw:
    """The loop one would write by hand."""

    def __init__(self, model: nn.Module, batches: Iterator[Batch]) -> None:
        self.model, self.batches = model, batches
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def block(self, steps: int) -> Spent:
        ready = [next(self.batches) for _ in range(steps)]
        clock = Clock()
        for batch in ready:
            output = self.model(batch)
            loss = self.model.loss(output).total / batch.num_predicted
            for record in output.records:
                for term in record.losses.values():
                    loss = loss + term
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return clock.spent()


def spread(pairs: list[tuple[float, float]], *, steps: int) -> dict[str, Any]:
    """Ratios of the pairs, and milliseconds of a step on each side."""
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    quarter = len(ratios) // 4
    ours, raw = ([pair[i] for pair in pairs] for i in (0, 1))
    return {
        "ratio": statistics.median(ratios),
        "middle_half": [ratios[quarter], ratios[-1 - quarter]],
        "ratio_of_sums": sum(ours) / sum(raw),
        "step_ms": {
            name: 1e3 * statistics.median(all_) / steps
            for name, all_ in (("ours", ours), ("raw", raw))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", default="catalogues-small")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="steps in a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results" / "step_overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = the_run(NamedCorpus(name=options.corpus), steps=(options.blocks + 1) * options.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = RunDir(Path(name))
        prepared = run.data.prepare(Preparation(folder, SingleProcess(), print))
        trainer = make_trainer(run, prepared=prepared, world=SingleProcess())
        twin = make_trainer(run, prepared=prepared, world=SingleProcess())
        log = LogHook(writer=JsonlWriter(folder.metrics), progress=no_progress(RunStatus(steps=1)))
        ours = Ours(trainer, [*standard_hooks(trainer, run_dir=folder), log])
        raw = Raw(twin.model, twin.data)
        ours.block(WARM), raw.block(WARM)
        ours.waited = 0.0
        pairs = []
        for turn in range(options.blocks):
            sides = [ours, raw] if turn % 2 else [raw, ours]
            seconds = {side: side.block(options.steps) for side in sides}
            pairs.append((seconds[ours], seconds[raw]))
        trainer.data.close()
        twin.data.close()
    result = {
        "question": "seconds of a training step, ours over a raw loop of the same model",
        "wall": spread([(mine.wall, theirs.wall) for mine, theirs in pairs], steps=options.steps),
        "cpu": spread([(mine.cpu, theirs.cpu) for mine, theirs in pairs], steps=options.steps),
        "waiting_for_data": ours.waited / sum(mine.wall for mine, _ in pairs),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "blocks": options.blocks,
        "steps": options.steps,
        "threads": options.threads,
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
