"""An MoE layer on this machine beside a dense one of the same rows, and beside other libraries."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesaic.bench import ours, rivals
from moesaic.bench.machine import commit, machine
from moesaic.bench.problem import Absent, Contender, Passes, Problem, Skew, make_problem
from moesaic.bench.saved import saved_bytes
from moesaic.bench.shapes import Shape
from moesaic.bench.timing import Laps, against, fastest, measure, of_pacer
from moesaic.core.errors import UserError, did_you_mean
from moesaic.core.shapes import Tensor

Maker = Callable[[Problem], Contender | Absent]

DENSE = ("dense", "dense-compiled")
CONTENDERS: dict[str, Maker] = {
    "dense": ours.dense,
    "dense-compiled": ours.dense_compiled,
    "moesaic": ours.moesaic,
    "moesaic-bfloat16": ours.moesaic_bfloat16,
    "moesaic-zipf": ours.moesaic_zipf,
    "composed-segments": ours.composed("segments"),
    "composed-grouped_mm": ours.composed("grouped_mm"),
    "composed-padded_bmm": ours.composed("padded_bmm"),
    "hf-grouped_mm": rivals.hugging_face("grouped_mm"),
    "hf-eager": rivals.hugging_face("eager"),
    "deepspeed": rivals.deepspeed,
    "read-weights": ours.read_weights,
}
SHORT = {"hf": "hf-grouped_mm", "composed": "composed-segments"}
DECODING = 16  # rows per expert up to which reading the weights is what counts


@dataclass(frozen=True, slots=True)
class Question:
    """What is measured. ``against`` are names of ``CONTENDERS``; dense and moesaic always run."""

    shape: Shape
    passes: Passes = "forward+backward"
    against: Sequence[str] = ("dense-compiled", "composed", "hf", "deepspeed")
    skew: Skew = "none"
    dtype: torch.dtype = torch.float32
    threads: int = 0
    rounds: int = 9


def bench_layer(question: Question) -> dict[str, Any]:
    """Measure, and return everything that the table is made of, as plain values."""
    names = contender_names(question)
    about = machine()
    with _threads(question.threads):
        problem = make_problem(question.shape, passes=question.passes, skew=question.skew)
        problem = problem.to(question.dtype)
        made = [CONTENDERS[name](problem) for name in names]
        present = {c.name: c for c in made if isinstance(c, Contender)}
        runs = {name: contender.run for name, contender in present.items()}
        pacer = fastest(runs, among=[name for name in DENSE if name in present])
        laps = measure(runs, pacer=pacer, rounds=question.rounds)
        answers = _differences(present)
        saved = {n: saved_bytes(c) for n, c in present.items() if problem.trains}
        threads = torch.get_num_threads()
    rows = {name: _row(name, laps, pacer=pacer) for name in present}
    for name, row in rows.items():
        row |= {"saved_bytes": saved.get(name), "differs_by": answers.get(name)}
    asked = asdict(question) | {"dtype": str(question.dtype).removeprefix("torch.")}
    return {
        "question": asked | {"threads": threads, "against": names},
        "dense": pacer,
        "contenders": rows,
        "absent": {c.name: c.reason for c in made if isinstance(c, Absent)},
        "largest_load": _largest_load(problem),
        "least_saved_bytes": 4 * question.shape.kept if problem.trains else None,
        "machine": about,
        "commit": commit(),
    }


def contender_names(question: Question) -> list[str]:
    """The contenders of a question, in the order of ``CONTENDERS``."""
    asked = [SHORT.get(name, name) for name in question.against]
    for name in asked:
        if name not in CONTENDERS:
            known = [*SHORT, *CONTENDERS]
            raise UserError(
                f'there is no contender "{name}"{did_you_mean(name, known)} (known: {", ".join(known)})'
            )
    asked += ["dense", "moesaic"]
    shape = question.shape
    if question.passes == "forward" and shape.rows <= DECODING * shape.experts:
        asked.append("read-weights")
    return [name for name in CONTENDERS if name in asked]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row(name: str, laps: Mapping[str, Laps], *, pacer: str) -> dict[str, Any]:
    seconds = sorted(laps[name].seconds.values())
    return {
        "median_ms": 1e3 * seconds[len(seconds) // 2],
        "min_ms": 1e3 * seconds[0],
        "runs": len(seconds),
        "of_dense": asdict(of_pacer(laps[name], laps[pacer])),
        "of_moesaic": asdict(against(laps[name], laps["moesaic"])),
    }


def _differences(present: Mapping[str, Contender]) -> dict[str, float]:
    """How far each answer is from ours: the largest difference over the largest value."""
    with torch.no_grad():
        want = present["moesaic"].forward()
        scale = want.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        found: dict[str, Tensor] = {
            name: c.forward() for name, c in present.items() if c.pull.shape == want.shape
        }
    return {
        name: float((out.float() - want.float()).abs().max() / scale)
        for name, out in found.items()
        if out.shape == want.shape
    }


def _largest_load(problem: Problem) -> float:
    """Rows of the fullest expert over an equal share."""
    logits = problem.x.float() @ problem.gate.float().t()
    chosen = logits.topk(problem.shape.k).indices.flatten()
    load = torch.bincount(chosen, minlength=problem.shape.experts)
    return float(load.max()) * problem.shape.experts / problem.shape.rows
