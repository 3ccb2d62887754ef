"""What others have measured about plans, asked of the planner: the order, not the figures.

1. MoE Parallel Folding (2504.14960): Mixtral 8x22B on 128 H100, folded against unfolded expert
   parallelism; secondary texts quote 49.3 % and 46.3 % MFU.
2. Small expert parallelism with streamed experts against large expert parallelism that crosses
   nodes (NVIDIA/Megatron-LM issue 6491, 32 GH200; ``tests/planner/streamed_experts.py`` has the
   models, the machine and what is not published).

    python benchmarks/known_plans.py
"""

import sys
from pathlib import Path
from typing import Any

from support import write_result

from moesaic.core.errors import UserError
from moesaic.model.presets import preset
from moesaic.parallel.activation_checkpointing import NoActivationCheckpointing
from moesaic.planner.machine import Machine, find_machine
from moesaic.planner.plan_report import PlanRequest, find_plans, machine_limits, plan_words
from moesaic.planner.plan_space import (
    RESIDENT,
    STREAMED,
    WEIGHTS_AND_STATES_ON_HOST,
    PlanSpace,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "planner"))

from streamed_experts import (  # noqa: E402
    MODELS,
    RANKS,
    SPACE,
    forecast,
    nodes_of_four,
    request,
    tokens_per_second,
)

OUT = ROOT / "benchmarks" / "results" / "known_plans.json"
AWAY = (WEIGHTS_AND_STATES_ON_HOST, STREAMED)
MEASURED = {  # (model, tensor, expert, streamed): tokens a second and device; None: out of memory
    ("46B", 4, 4, False): None,
    ("46B", 4, 8, False): 7_000,
    ("46B", 4, 4, True): 8_700,
    ("27B", 2, 4, False): 18_100,
    ("27B", 2, 4, True): 17_000,
}


def best(request: PlanRequest, machine: Machine) -> dict[str, Any]:
    """Return the fastest plan of a request on a machine, or why there is none."""
    limits = machine_limits(machine, ranks=request.space.ranks)
    try:
        report = find_plans(request, machine=machine, limits=limits, keep=1)
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
    space = PlanSpace(  # as they: ZeRO 1, and nothing recomputed
        ranks=128,
        rows=256,
        target=4096,
        memory=(RESIDENT,),
        zero=(0, 1),
        checkpointing=(NoActivationCheckpointing(),),
    )
    found = {}
    for name, folded in (("folded", True), ("unfolded", False)):
        request = PlanRequest(name="mixtral-8x22b", model=model, space=space.replace(folded=folded))
        found[name] = best(request, find_machine("h100"))
    return found


def streamed() -> dict[str, Any]:
    """Return each plan that they ran, and the fastest of the space with and without streaming."""
    limits = machine_limits(nodes_of_four(), ranks=RANKS)
    found: dict[str, Any] = {}
    for (model, tensor, expert, away), theirs in MEASURED.items():
        plan = forecast(model, tensor=tensor, expert=expert, streamed=away)
        words = f"{model}, expert {expert}, {'streamed' if away else 'resident'}"
        found[words] = {
            "plan": plan_words(plan.choice),
            "bytes": plan.by_tier,
            "fits": limits.excess(plan.by_tier)[0] <= 1,
            "tokens_per_second_and_device": tokens_per_second(plan),
            "theirs": theirs,
        }
    for model in MODELS:
        for name, memory in {"resident": (RESIDENT,), "streamed": AWAY}.items():
            asked = request(model, space=SPACE.replace(memory=memory))
            found[f"{model}, fastest, {name}"] = best(asked, nodes_of_four())
    return found


if __name__ == "__main__":
    write_result(OUT, {"folding": folding(), "streamed": streamed()})
