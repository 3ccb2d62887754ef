"""What plans for 64 to 8,192 ranks hold and send: closed forms, and one rank rehearsed of each.

Every plan is priced at the tokens of a real step, then one rank takes a step of few tokens on fake
tensors, in a process of its own, and what it held and sent is compared with the closed form at
those tokens. Last, the capacity that 2109.10465 claims is asked of the same arithmetic.

    python benchmarks/scale.py
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support import write_result

from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.parameter_count import BatchDims, count_parameters
from moesaic.model.presets import preset
from moesaic.ops.grouped_gemm import SequentialGEMM
from moesaic.ops.moe_kernel import UnfusedMoEKernel
from moesaic.parallel.communication_volume import communication_volume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.memory_estimate import (
    MIXED_PRECISION,
    EstimateSettings,
    LargestModel,
    MemoryBudget,
    estimate_memory,
    largest_fitting_model,
)
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.train.dry_run import simulate_step, with_round_robin_routing

OUT = Path(__file__).parent / "results" / "scale.json"
PAIRS, TEXT = BatchDims(rows=16, source=128, target=128), BatchDims(rows=1, source=0, target=6144)
# as few as are even over the experts
FEW_PAIRS, FEW_TEXT = (
    BatchDims(rows=16, source=32, target=32),
    BatchDims(rows=1, source=0, target=384),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A preset on so many ranks."""

    preset: str
    world: int
    plan: ParallelPlan
    words: str

    @property
    def sizes(self) -> tuple[BatchDims, BatchDims]:
        """The tokens of a data rank in a real step, and in a rehearsed one."""
        text = self.preset.startswith("trillion")
        return (TEXT, FEW_TEXT) if text else (PAIRS, FEW_PAIRS)


def plan(**degrees: Any) -> ParallelPlan:
    return ParallelPlan(**degrees)


TEN = "zcode-m3-64"
CASES = (
    Case(TEN, 64, plan(expert=64), "E"),
    Case(TEN, 64, plan(expert=16), "E+D"),
    Case(TEN, 64, plan(expert=16, zero=2), "E+Z"),
    Case(TEN, 64, plan(expert=16, tensor=4), "E+D+M"),
    Case(TEN, 64, plan(expert=16, tensor=4, zero=2), "E+Z+M"),
    Case(TEN, 64, plan(expert=16, tensor=4, zero=2, offload=True), "E+Z-Offload+M"),
    Case(TEN, 128, plan(expert=64, zero=2), "E+Z"),
    Case(TEN, 256, plan(expert=64, zero=2), "E+Z"),
    Case(TEN, 512, plan(expert=64, zero=2), "E+Z"),
    Case("zcode-200b", 64, plan(expert=64, tensor=4, zero=3), "E+Z+M"),
    Case("zcode-200b", 128, plan(expert=128, tensor=4, zero=3), "E+Z+M"),
    Case("zcode-200b", 256, plan(expert=128, tensor=4, zero=3), "E+Z+M"),
    Case("zcode-200b", 512, plan(expert=128, tensor=4, zero=3), "E+Z+M"),
    Case("trillion-384", 1024, plan(expert=128, tensor=8, zero=3), "E+Z+M"),
    Case("trillion-384", 8192, plan(expert=128, tensor=8, zero=3), "E+Z+M"),
)


def priced(case: Case) -> dict[str, Any]:
    """Return what rank 0 of a case holds and sends, in closed form."""
    started = time.perf_counter()
    config, parallel = preset(case.preset).config, ParallelConfig(plan=case.plan)
    holding = ParameterInventory(config).on_rank(parallel, world=case.world)
    sizes = case.sizes[0]
    held, lines = estimate_memory(holding, sizes=sizes), communication_volume(holding, sizes=sizes)
    return {
        "preset": case.preset,
        "parameters": count_parameters(config).total,
        "world": case.world,
        "words": case.words,
        "plan": holding.plan.to_dict(),
        "sizes": asdict(sizes),
        "bytes": asdict(held) | {"device": held.device},
        "sent": [asdict(line) for line in lines],
        "seconds": round(time.perf_counter() - started, 2),
    }


def rehearsed(case: Case) -> dict[str, Any]:
    """Rehearse a case here and compare it with its closed form."""
    config, parallel, sizes = (
        preset(case.preset).config,
        ParallelConfig(plan=case.plan),
        case.sizes[1],
    )
    cpu = time.process_time()
    done = simulate_step(config, parallel=parallel, world_size=case.world, sizes=sizes)
    cpu = time.process_time() - cpu
    holding = ParameterInventory(with_round_robin_routing(config)).on_rank(
        parallel, world=case.world
    )
    said = estimate_memory(holding, sizes=sizes, kernel=UnfusedMoEKernel(SequentialGEMM()))
    lines = communication_volume(holding, sizes=sizes)
    kinds = sorted({line.kind for line in (*lines, *done.sent)})
    sent = {
        kind: [sum(line.bytes for line in of if line.kind == kind) for of in (done.sent, lines)]
        for kind in kinds
    }
    held = {
        name: [asdict(done)[name], asdict(said)[name]]
        for name in ("weights", "gradients", "optimizer")
    }
    return {
        "sizes": asdict(sizes),
        "held": held,
        "sent": sent,
        "equal": all(a == b for a, b in (*held.values(), *sent.values())),
        "kept": done.saved_activations,
        "peak": done.peak,
        "forecast_peak": said.weights + said.gradients + said.gathered + said.activations,
        "seconds": round(done.seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def elsewhere(number: int) -> dict[str, Any]:
    """Rehearse a case in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--only", str(number)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def capacity() -> dict[str, Any]:
    """The claim of 2109.10465: 512 GPUs of 40 GB, with and without the host's memory.

    2 + 2 + 12 bytes per parameter. The bases are those of two presets; experts are added until a
    GPU, or its share of the host's memory, is full. 125 GB per GPU are 1 TB for eight.
    """
    small, wide = preset(TEN).config, preset("zcode-200b").config
    alone, sliced = plan(expert=512), plan(expert=512, tensor=8)
    hosted = plan(expert=256, tensor=8, zero=3, offload=True)
    asked = {
        "E, base of 0.6B": (small, alone, float("inf")),
        "E, base of 5B": (wide, alone, float("inf")),
        "E+M, base of 5B": (wide, sliced, float("inf")),
        "E+Z-Offload+M, base of 5B, 125 GB of host memory per GPU": (wide, hosted, 125e9),
        "E+Z-Offload+M, base of 5B, 250 GB of host memory per GPU": (wide, hosted, 250e9),
    }
    found = {}
    for name, (base, degrees, host) in asked.items():
        setting = EstimateSettings(ParallelConfig(plan=degrees), 512, PAIRS, MIXED_PRECISION)
        found[name] = _shown(
            largest_fitting_model(base, settings=setting, budget=MemoryBudget(40e9, host))
        )
    return found


def _shown(found: LargestModel | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "experts": found.experts,
        "parameters": found.parameters,
        "device": found.memory.device,
        "host": found.memory.host,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, help="rehearse this case here and print it")
    only = parser.parse_args().only
    if only is not None:
        print(json.dumps(rehearsed(CASES[only])))
        return
    cases = [priced(case) | {"rehearsal": elsewhere(number)} for number, case in enumerate(CASES)]
    write_result(OUT, {"cases": cases, "capacity": capacity()})


if __name__ == "__main__":
    main()
