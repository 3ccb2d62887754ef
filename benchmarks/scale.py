"""Memory and communication of plans for 64 to 8,192 ranks: estimates, and one simulated rank each.

Every plan is estimated at the tokens of a real step. Then rank 0 is simulated for a step with few
tokens on fake tensors, in its own process, and compared with the estimate for those tokens. Last,
the same arithmetic is applied to the model size that 2109.10465 claims.

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

from moesaic.parallel.memory_estimate import (
    EstimateSettings,
    LargestModel,
    MemoryBudget,
    estimate_memory,
    largest_fitting_model,
)
from support import write_result

from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.model.parameter_flop_count import BatchDims, count_parameters
from moesaic.model.presets import preset
from moesaic.ops.grouped_gemm import SequentialGEMM
from moesaic.ops.moe_kernel import UnfusedMoEKernel
from moesaic.parallel.communication_volume import communication_volume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.precision import BFloat16
from moesaic.planner.dry_run import simulate_step, with_round_robin_routing

OUT = Path(__file__).parent / "results" / "scale.json"
PAIRS, TEXT = BatchDims(rows=16, source=128, target=128), BatchDims(rows=1, source=0, target=6144)
# the fewest tokens that divide evenly over the experts
FEW_PAIRS, FEW_TEXT = (
    BatchDims(rows=16, source=32, target=32),
    BatchDims(rows=1, source=0, target=384),
)


RESIDENT = MemoryPlan()
OFFLOADED = MemoryPlan(
    parameters=HostMemory(), gradients=HostMemory(), optimizer_states=HostMemory()
)


@dataclass(frozen=True, slots=True)
class Case:
    """A preset and a plan on ``world`` ranks."""

    preset: str
    world: int
    plan: ParallelPlan
    words: str
    memory: MemoryPlan = RESIDENT

    @property
    def sizes(self) -> tuple[BatchDims, BatchDims]:
        """The tokens of a data rank in a real step, and in a simulated one."""
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
    Case(TEN, 64, plan(expert=16, tensor=4, zero=2), "E+Z-Offload+M", OFFLOADED),
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


def estimated(case: Case) -> dict[str, Any]:
    """Return the estimated memory and communication of rank 0."""
    started = time.perf_counter()
    config, parallel = (
        preset(case.preset).config,
        ParallelConfig(plan=case.plan, memory=case.memory),
    )
    parameters = ParameterInventory(config).on_rank(parallel, world=case.world)
    sizes = case.sizes[0]
    memory, lines = (
        estimate_memory(parameters, sizes=sizes),
        communication_volume(parameters, sizes=sizes),
    )
    return {
        "preset": case.preset,
        "parameters": count_parameters(config).total,
        "world": case.world,
        "words": case.words,
        "plan": parameters.plan.to_dict(),
        "sizes": asdict(sizes),
        "bytes": asdict(memory) | {"device": memory.device},
        "sent": [asdict(line) for line in lines],
        "seconds": round(time.perf_counter() - started, 2),
    }


def simulated(case: Case) -> dict[str, Any]:
    """Simulate a case in this process and compare it with its estimate."""
    config, parallel, sizes = (
        preset(case.preset).config,
        ParallelConfig(plan=case.plan, memory=case.memory),
        case.sizes[1],
    )
    cpu = time.process_time()
    done = simulate_step(config, parallel=parallel, world_size=case.world, sizes=sizes)
    cpu = time.process_time() - cpu
    parameters = ParameterInventory(with_round_robin_routing(config)).on_rank(
        parallel, world=case.world
    )
    memory = estimate_memory(parameters, sizes=sizes, kernel=UnfusedMoEKernel(SequentialGEMM()))
    lines = communication_volume(parameters, sizes=sizes)
    kinds = sorted({line.kind for line in (*lines, *done.sent)})
    sent = {
        kind: [sum(line.bytes for line in of if line.kind == kind) for of in (done.sent, lines)]
        for kind in kinds
    }
    held = {
        name: [asdict(done)[name], asdict(memory)[name]]
        for name in ("weights", "gradients", "optimizer")
    }
    return {
        "sizes": asdict(sizes),
        "held": held,
        "sent": sent,
        "equal": all(a == b for a, b in (*held.values(), *sent.values())),
        "kept": done.saved_activations,
        "peak": done.peak,
        "forecast_peak": memory.weights + memory.gradients + memory.gathered + memory.activations,
        "seconds": round(done.seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def simulated_in_subprocess(number: int) -> dict[str, Any]:
    """Simulate a case in a new process, whose peak memory is then that of the case."""
    command = [sys.executable, __file__, "--only", str(number)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def capacity() -> dict[str, Any]:
    """Return the largest models of 2109.10465's claim: 512 GPUs of 40 GB, with and without offload.

    2 + 2 + 12 bytes per parameter. The base models are two presets; experts are added until a GPU,
    or its share of host memory, is full. 125 GB per GPU are 1 TB for eight.
    """
    small, wide = preset(TEN).config, preset("zcode-200b").config
    alone, sliced = plan(expert=512), plan(expert=512, tensor=8)
    hosted = plan(expert=256, tensor=8, zero=3)
    asked = {
        "E, base of 0.6B": (small, alone, float("inf")),
        "E, base of 5B": (wide, alone, float("inf")),
        "E+M, base of 5B": (wide, sliced, float("inf")),
        "E+Z-Offload+M, base of 5B, 125 GB of host memory per GPU": (wide, hosted, 125e9),
        "E+Z-Offload+M, base of 5B, 250 GB of host memory per GPU": (wide, hosted, 250e9),
    }
    found = {}
    for name, (base, degrees, host) in asked.items():
        memory = OFFLOADED if degrees is hosted else RESIDENT
        parallel = ParallelConfig(plan=degrees, memory=memory)
        setting = EstimateSettings(parallel, 512, PAIRS, BFloat16())
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
    parser.add_argument("--only", type=int, help="simulate this case in this process and print it")
    only = parser.parse_args().only
    if only is not None:
        print(json.dumps(simulated(CASES[only])))
        return
    cases = [
        estimated(case) | {"rehearsal": simulated_in_subprocess(number)}
        for number, case in enumerate(CASES)
    ]
    write_result(OUT, {"cases": cases, "capacity": capacity()})


if __name__ == "__main__":
    main()
