"""Forecast and measured peak memory of training steps: the forecasts are written before the runs.

Each case is a model, a plan and a precision. ``step_cost`` forecasts the peak of rank 0; all
forecasts are written with their SHA-256 first. Then every case takes two steps on real ranks, and
the peak of the second is measured: the bytes of all live tensors at every operation
(``AllocationMeter``), and the growth of ``RssAnon`` beside it.

    python benchmarks/peak_forecast.py
"""

import gc
import json
import re
import statistics
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from support import write_result

from moesaic.core.markdown import markdown_table
from moesaic.core.units import show_bytes
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.mesh import Mesh
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.optim.optimizer import AdamW, EightBitStates
from moesaic.parallel.activation_checkpointing import CheckpointBlocks
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.context_parallel import Ring
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.parallel.parallelize import expert_counts, parallelize_on_mesh
from moesaic.parallel.pipeline import LossSettings
from moesaic.parallel.pipeline_schedules import (
    BreadthFirst,
    GPipe,
    Interleaved,
    OneForwardOneBackward,
)
from moesaic.parallel.precision import BFloat16, BFloat16Autocast
from moesaic.parallel.weight_start import draw_shards
from moesaic.planner.cost_entries import DEVICE
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.dry_run import dummy_batch, with_round_robin_routing
from moesaic.planner.step_cost import step_cost

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cost_counters import AllocationMeter  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "guide" / "cost.md"
MARKS = re.compile(r"(<!-- peak: begin -->\n).*?(<!-- peak: end -->)", re.S)
MODEL = ModelConfig(
    vocab_size=512,
    dim=64,
    encoder=Stack(layers=4),
    decoder=Stack(layers=4),
    attention=AttentionConfig(heads=4),
    feed_forward=FeedForwardConfig(hidden=256),
    moe=MoE(experts=8, select=TopK(k=2)),
)
DENSE = MODEL.replace(moe=NoMoE())
TEXT = MODEL.replace(encoder=Stack(layers=0), decoder=Stack(layers=6, moe_every=1))
PAIRS, ROWS = BatchDims(rows=8, source=32, target=32), BatchDims(rows=4, source=0, target=128)


def settings(model: ModelConfig, sizes: BatchDims, *, world: int = 1, **more: Any) -> CostSettings:
    """Return a case; ``plan`` are degrees of parallelism, ``parallel`` other choices."""
    plan, parallel = ParallelPlan(**more.pop("plan", {})), more.pop("parallel", {})
    return CostSettings(
        model=model,
        sizes=sizes,
        device="cpu",
        world=world,
        parallel=ParallelConfig(plan=plan, **parallel),
        **more,
    )


RECOMPUTE = {"activation_checkpointing": CheckpointBlocks()}
ONE_F = OneForwardOneBackward()
OWN_TABLE = TEXT.replace(embedding=EmbeddingConfig(tied=False))
PIPELINES = (
    ("1F1B", TEXT, ROWS, 2, 4, ONE_F, {}),
    ("GPipe", TEXT, ROWS, 2, 4, GPipe(), {}),
    ("interleaved", TEXT, ROWS, 2, 4, Interleaved(), {}),
    ("1F1B, 2 micro-batches", TEXT, ROWS, 2, 2, ONE_F, {}),
    ("1F1B, 7 micro-batches", TEXT, ROWS, 2, 7, ONE_F, {}),
    ("GPipe, 3 micro-batches", TEXT, ROWS, 2, 3, GPipe(), {}),
    ("interleaved, 6 micro-batches", TEXT, ROWS, 2, 6, Interleaved(), {}),
    ("interleaved of 3", TEXT, ROWS, 2, 4, Interleaved(stages=3), {}),
    ("breadth first", TEXT, ROWS, 2, 4, BreadthFirst(), {}),
    ("1F1B, own output table", OWN_TABLE, ROWS, 2, 4, ONE_F, {}),
    ("1F1B, encoder and decoder", MODEL, PAIRS, 2, 4, ONE_F, {}),
    ("1F1B, dense", DENSE, PAIRS, 2, 4, ONE_F, {}),
    ("1F1B, recomputed", TEXT, ROWS, 2, 4, ONE_F, RECOMPUTE),
    ("1F1B", TEXT, ROWS, 3, 5, ONE_F, {}),
)
CASES = {
    "dense": settings(DENSE, PAIRS),
    "MoE": settings(MODEL, PAIRS),
    "MoE, decoder alone": settings(TEXT, ROWS),
    "MoE, dropout": settings(MODEL.replace(dropout=0.1), PAIRS),
    "MoE, biases": settings(MODEL.replace(bias=True), PAIRS),
    "MoE, 32 experts": settings(MODEL.replace(moe=MoE(experts=32, select=TopK(k=4))), PAIRS),
    "MoE, 3 micro-batches": settings(MODEL, PAIRS, micro_batches=3),
    "MoE, LoRA": settings(MODEL, PAIRS, trainable=LoRA(rank=4)),
    "MoE, bfloat16": settings(MODEL, PAIRS, precision=BFloat16()),
    "MoE, bfloat16 autocast": settings(MODEL, PAIRS, precision=BFloat16Autocast()),
    "Z3 of 2, bfloat16": settings(TEXT, ROWS, world=2, plan={"zero": 3}, precision=BFloat16()),
    "dense, recomputed": settings(DENSE, PAIRS, parallel=RECOMPUTE),
    "MoE, recomputed": settings(MODEL, PAIRS, parallel=RECOMPUTE),
    "MoE, every second recomputed": settings(
        TEXT, ROWS, parallel={"activation_checkpointing": CheckpointBlocks(every=2)}
    ),
    "D of 2": settings(MODEL, PAIRS, world=2),
    "E of 2": settings(MODEL, PAIRS, world=2, plan={"expert": 2}),
    "E of 2, skewed": settings(TEXT, ROWS, world=2, plan={"expert": 2}, busiest_share=0.3),
    "E of 4": settings(TEXT, ROWS, world=4, plan={"expert": 4}),
    "M of 2": settings(MODEL, PAIRS, world=2, plan={"tensor": 2}),
    "E+M of 4": settings(MODEL, PAIRS, world=4, plan={"expert": 2, "tensor": 2}),
    "C of 2, Ulysses": settings(TEXT, ROWS, world=2, plan={"context": 2}),
    "C of 2, ring": settings(
        TEXT, ROWS, world=2, plan={"context": 2}, parallel={"context_parallel": Ring()}
    ),
    "Z1 of 2": settings(MODEL, PAIRS, world=2, plan={"zero": 1}),
    "Z2 of 2": settings(TEXT, ROWS, world=2, plan={"zero": 2}),
    "Z3 of 2": settings(MODEL, PAIRS, world=2, plan={"zero": 3}),
    "E+Z3 of 4": settings(TEXT, ROWS, world=4, plan={"expert": 2, "zero": 3}),
    "Z3 of 2, 3 micro-batches": settings(TEXT, ROWS, world=2, plan={"zero": 3}, micro_batches=3),
    "Z3 of 2, recomputed": settings(TEXT, ROWS, world=2, plan={"zero": 3}, parallel=RECOMPUTE),
    **{
        f"P of 2, D of 2, Z{stage}": settings(
            TEXT, ROWS, world=4, plan={"pipe": 2, "zero": stage}, micro_batches=4
        )
        for stage in (1, 2, 3)
    },
    "P of 2, D of 2, Z1, dense": settings(
        DENSE, PAIRS, world=4, plan={"pipe": 2, "zero": 1}, micro_batches=4
    ),
    "Z1 of 2, MoE, 3 micro-batches": settings(
        TEXT, ROWS, world=2, plan={"zero": 1}, micro_batches=3
    ),
    "MoE, 8-bit states": settings(MODEL, PAIRS, optimizer=AdamW(states=EightBitStates())),
    **{
        f"P of {ranks}, {name}": settings(
            model,
            sizes,
            world=ranks,
            plan={"pipe": ranks},
            micro_batches=number,
            parallel={"pipeline_schedule": schedule} | more,
        )
        for name, model, sizes, ranks, number, schedule, more in PIPELINES
    },
}


@dataclass(frozen=True, slots=True)
class MeasuredPeak:
    """The most bytes of all live tensors at once in a step, and the growth of ``RssAnon``."""

    tensors: int
    rss: int


def forecast(case: CostSettings) -> int:
    """Return the forecast peak of rank 0."""
    return step_cost(case).peak[DEVICE]


def measured_peak(case: CostSettings) -> MeasuredPeak:
    """Return the peak of the second of two real steps on rank 0."""
    if case.world == 1:
        return _run(case, rank=0)
    return run_on_ranks(case.world, _run_forked, case)[0]


def _run_forked(case: CostSettings) -> MeasuredPeak:
    return _run(case, rank=torch.distributed.get_rank())


def _run(case: CostSettings, *, rank: int) -> MeasuredPeak:
    model_config = with_round_robin_routing(case.model, busiest_share=case.busiest_share)
    _warm_up(model_config, case.sizes)
    gc.collect()
    before, meter = _rss_anon(), AllocationMeter()
    with meter, meter.ledger.watch_resizes(), _RssGauge() as gauge:
        model = Transformer.without_values(model_config)
        case.trainable.attach(model)
        mesh = Mesh(
            case.parallel.plan.resolve(case.world),
            rank=rank,
            device=torch.device("cpu"),
            expert_counts=expert_counts(model),
        )
        parallel_model = parallelize_on_mesh(
            model, parallel=case.parallel, mesh=mesh, precision=case.precision
        )
        draw_shards(parallel_model, seed=0)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(case.trainable.includes(name))
        kinds = model.parameter_kinds()
        optimizer = case.optimizer.build(
            model.named_parameters(), kinds=kinds, master_weights=case.precision.master_weights
        )
        batches = [dummy_batch(case.model, case.sizes) for _ in range(case.micro_batches)]
        for _ in range(2):
            meter.ledger.reset_peak()
            _forward_backward(parallel_model, batches)
            parallel_model.sum_gradients()
            optimizer.step()
            optimizer.zero_grad()
    return MeasuredPeak(meter.ledger.peak_bytes, gauge.most - before)


def _forward_backward(parallel_model: Any, batches: Sequence[Any]) -> None:
    model = parallel_model.model
    if parallel_model.pipeline is not None:
        parallel_model.before_backward(last=False)
        parallel_model.pipeline.forward_backward(batches, loss_settings=LossSettings(1))
        return
    for number, batch in enumerate(batches):
        parallel_model.before_backward(last=number == len(batches) - 1)
        with parallel_model.precision.autocast(batch.device):
            output = model(batch)
            loss = model.loss(output)
        terms = [value for record in output.records for value in record.losses.values()]
        torch.stack([loss.total, *terms]).sum().backward()
        del output, loss, terms


def _warm_up(config: ModelConfig, sizes: BatchDims) -> None:
    """Let kernels be tried once: that keeps tensors of its own."""
    model = Transformer(config)
    model.loss(model(dummy_batch(config, sizes))).total.backward()


def _rss_anon() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class _RssGauge:
    """Reads ``RssAnon`` every millisecond in a thread; ``most`` is the largest value."""

    def __init__(self) -> None:
        self.most, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "_RssGauge":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, _rss_anon())


def main() -> None:
    torch.set_num_threads(1)
    forecasts = {name: forecast(case) for name, case in CASES.items()}
    text = json.dumps(forecasts, sort_keys=True)
    (RESULTS / "peak_forecast_before.json").write_text(
        json.dumps({"sha256": sha256(text.encode()).hexdigest(), "peak_bytes": forecasts}, indent=1)
    )
    lines, errors = [], {}
    for name, case in CASES.items():
        found = measured_peak(case)
        errors[name] = forecasts[name] / found.tensors - 1
        lines.append(
            {
                "case": name,
                "forecast_bytes": forecasts[name],
                "measured_bytes": found.tensors,
                "error": round(errors[name], 4),
                "rss_anon_growth_bytes": found.rss,
            }
        )
        print(f"{errors[name]:+7.2%}  {name}", flush=True)
    sizes = [abs(error) for error in errors.values()]
    misses = {name: round(error, 4) for name, error in errors.items() if abs(error) > 0.02}
    result = {
        "median_error": round(statistics.median(sizes), 4),
        "worst_error": round(max(sizes), 4),
        "over_2_percent": misses,
        "forecast_sha256": sha256(text.encode()).hexdigest(),
        "cases": lines,
    }
    write_result(RESULTS / "peak_forecast.json", result)
    write_page(result)


def write_page(result: Mapping[str, Any]) -> None:
    """Write the table into the guide's page, between its markers."""
    rows = [
        (
            case["case"],
            show_bytes(case["forecast_bytes"]),
            show_bytes(case["measured_bytes"]),
            f"{case['error']:+.2%}",
        )
        for case in result["cases"]
    ]
    over = len(result["over_2_percent"])
    body = (
        f"The error is {result['median_error']:.2%} in the median and {result['worst_error']:.2%} "
        f"at worst; {over} of {len(rows)} are off by more than 2 %.\n\n"
        + markdown_table(("case", "forecast", "measured", "error"), rows, right=True)
    )
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKS.sub(lambda m: f"{m[1]}{body}\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
