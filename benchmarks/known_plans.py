"""What others have measured about plans, asked of the planner: the order, not the figures.

1. MoE Parallel Folding (2504.14960): Mixtral 8x22B on 128 H100, folded against unfolded expert
   parallelism; secondary texts quote 49.3 % and 46.3 % MFU.
2. Small expert parallelism with weights on the host against large expert parallelism without
   (NVIDIA/Megatron-LM issue 6491, 32 GH200): 8,700 against 7,000 tokens/s per GPU for a model of
   40B parameters, which is not published; the model here is Mixtral 8x7B's shape.

    python benchmarks/known_plans.py
"""

from pathlib import Path
from typing import Any

from support import write_result

from moesaic.core.errors import UserError
from moesaic.model.presets import preset
from moesaic.planner.machine import find_machine
from moesaic.planner.plan_report import PlanRequest, find_plans, machine_limits, plan_words
from moesaic.planner.plan_space import GRADIENTS_ON_HOST, RESIDENT, STREAMED, PlanSpace

OUT = Path(__file__).parent / "results" / "known_plans.json"


def best(request: PlanRequest, machine: str) -> dict[str, Any]:
    """Return the fastest plan of a request on a machine, or why there is none."""
    cluster = find_machine(machine)
    limits = machine_limits(cluster, ranks=request.space.ranks)
    try:
        report = find_plans(request, machine=cluster, limits=limits, keep=1)
    except UserError as error:
        return {"why_none": str(error)}
    found = report.best[0]
    return {
        "plan": plan_words(found.choice),
        "seconds": found.time.total,
        "tokens_per_second_and_device": report.tokens_per_second(found) / request.space.ranks,
        "mfu_active": report.mfu(found),
        "certificate": report.certificate.holds,
    }


def folding() -> dict[str, Any]:
    model = preset("mixtral-8x22b").config
    space = PlanSpace(ranks=128, rows=256, target=4096, memory=(RESIDENT,))
    found = {}
    for name, folded in (("folded", True), ("unfolded", False)):
        request = PlanRequest(name="mixtral-8x22b", model=model, space=space.replace(folded=folded))
        found[name] = best(request, "h100")
    return found


def offload() -> dict[str, Any]:
    small = preset("mixtral-8x22b").config
    model = small.replace(
        dim=4096,
        decoder=small.decoder.replace(layers=32),
        attention=small.attention.replace(heads=32),
        feed_forward=small.feed_forward.replace(hidden=14_336),
    )
    space = PlanSpace(ranks=32, rows=1024, target=4096, max_pipe=1, max_tensor=1, max_context=1)
    tiers = {"resident": (RESIDENT,), "on the host": (GRADIENTS_ON_HOST, STREAMED)}
    return {
        name: best(
            PlanRequest(name="8x7b", model=model, space=space.replace(memory=memory)), "gh200"
        )
        for name, memory in tiers.items()
    }


if __name__ == "__main__":
    write_result(OUT, {"folding": folding(), "offload": offload()})
