"""Memory and communication of plans for 64 to 8,192 ranks: forecasts, and one simulated rank each.

Every plan is forecast at the tokens of a real step. Then rank 0 is simulated for a step with few
tokens on fake tensors, in its own process, and compared with the forecast for those tokens. Last,
the same arithmetic is applied to the model size that 2109.10465 claims.

    python benchmarks/scale.py
"""

import argparse
import dataclasses
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
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.presets import preset
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.precision import BFloat16, Float32, Precision
from moesaic.planner.capacity import LargestModel, MemoryBudget, largest_fitting_model
from moesaic.planner.cost_entries import DEVICE, HOST, Purpose
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.dry_run import simulate_step
from moesaic.planner.scale_report import scale_report
from moesaic.planner.step_cost import step_cost

OUT = Path(__file__).parent / "results" / "scale.json"
PAIRS, TEXT = BatchDims(rows=16, source=128, target=128), BatchDims(rows=1, source=0, target=6144)
# the fewest tokens that divide evenly over the experts
FEW_PAIRS, FEW_TEXT = (
    BatchDims(rows=16, source=32, target=32),
    BatchDims(rows=1, source=0, target=384),
)


FLOAT32, RESIDENT = Float32(), MemoryPlan()
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


def settings_of(
    config: ModelConfig, *, case: Case, sizes: BatchDims, precision: Precision = FLOAT32
) -> CostSettings:
    parallel = ParallelConfig(plan=case.plan, memory=case.memory)
    return CostSettings(
        model=config, parallel=parallel, precision=precision, sizes=sizes, world=case.world
    )


def estimated(case: Case) -> dict[str, Any]:
    """Return the forecast memory and communication of rank 0."""
    cpu = time.process_time()
    settings = settings_of(preset(case.preset).config, case=case, sizes=case.sizes[0])
    report = scale_report(settings)
    return {
        "preset": case.preset,
        "parameters": report["parameters"],
        "world": case.world,
        "words": case.words,
        "plan": case.plan.resolve(case.world).to_dict(),
        "sizes": asdict(settings.sizes),
        "bytes": report["bytes"],
        "sent": report["sent"],
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def simulated(case: Case) -> dict[str, Any]:
    """Simulate a whole step of rank 0 in this process and compare it with its forecast."""
    resident = dataclasses.replace(case, memory=RESIDENT)
    settings = settings_of(preset(case.preset).config, case=resident, sizes=case.sizes[1])
    cpu = time.process_time()
    done = simulate_step(settings)
    cpu = time.process_time() - cpu
    cost = step_cost(settings)
    kinds = sorted({line.kind for line in (*cost.sent, *done.sent)})
    sent = {
        kind: [sum(line.bytes for line in of if line.kind == kind) for of in (done.sent, cost.sent)]
        for kind in kinds
    }
    held = {
        "weights": [done.weights, cost.held_bytes(purpose=Purpose.WEIGHTS)],
        "gradients": [done.gradients, cost.held_bytes(purpose=Purpose.GRADIENTS)],
        "states": [done.optimizer, cost.held_bytes(purpose=Purpose.STATES)],
    }
    return {
        "sizes": asdict(settings.sizes),
        "held": held,
        "sent": sent,
        "equal": all(a == b for a, b in (*held.values(), *sent.values())),
        "peak": done.peak + done.optimizer,
        "forecast_peak": cost.peak[DEVICE],
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
        case = Case(TEN, 512, degrees, name, memory)
        settings = settings_of(base, case=case, sizes=PAIRS, precision=BFloat16())
        found[name] = _shown(
            largest_fitting_model(settings, budget=MemoryBudget(device=40e9, host=host))
        )
    return found


def _shown(found: LargestModel | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "experts": found.experts,
        "parameters": found.parameters,
        "device": found.peak[DEVICE],
        "host": found.peak.get(HOST, 0),
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
