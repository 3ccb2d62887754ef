"""Small expert parallelism with streamed experts against large: what others have measured.

NVIDIA/Megatron-LM issue 6491 compares plans on 32 GH200 in nodes of four. Its authors' notes
(github.com/FFGGSSJJ/moe_model_architecture, why-offloading-experts.md and offload-experts.md) give
the shape of the models, 2 rows of 4,096 tokens in a micro-batch, tensor parallelism 4 (2 for the
smaller model), ZeRO 1, float32 gradients, and 25 GB/s of all-to-all between nodes. The vocabulary
(that of Apertus, 131,072) and the rows of a step (512: half of what their runs on 64 devices have)
are our choice.
"""

from functools import cache

from moesaic.model.config import ModelConfig
from moesaic.model.presets import preset
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.shared_experts import SharedExperts
from moesaic.parallel.activation_checkpointing import NoActivationCheckpointing
from moesaic.parallel.precision import BFloat16
from moesaic.planner.inventory_cache import inventory_of
from moesaic.planner.machine import Machine, Sourced, find_machine
from moesaic.planner.plan_forecast import PlanForecast
from moesaic.planner.plan_model import PlanModel
from moesaic.planner.plan_report import PlanRequest, plan_model
from moesaic.planner.plan_space import (
    RESIDENT,
    WEIGHTS_AND_STATES_ON_HOST,
    CompletePlan,
    Degrees,
    Option,
    PlanSpace,
)

RANKS, NODE, ROWS = 32, 4, 512
NOTES = "github.com/FFGGSSJJ/moe_model_architecture"
SPACE = PlanSpace(
    ranks=RANKS, rows=ROWS, target=4096, max_pipe=1, max_context=1, zero=(0, 1), max_micro_rows=2
)
MODELS = {"46B": (448, 28), "27B": (256, 16)}  # experts of a layer, and of a token


def model_config(name: str) -> ModelConfig:
    """Return a model of four layers of experts."""
    experts, chosen = MODELS[name]
    base = preset("deepseek-moe-16b").config
    moe = MoE(
        experts=experts,
        hidden=2048,
        select=TopK(k=chosen),
        shared_experts=SharedExperts(number=1),
    )
    return base.replace(
        vocab_size=131_072,
        dim=4096,
        decoder=base.decoder.replace(layers=4, first_dense_layers=0),
        attention=base.attention.replace(heads=128),
        moe=moe,
    )


def nodes_of_four() -> Machine:
    """Return the GH200 of the machine files in nodes of four, with a slower network."""
    machine = find_machine("gh200")
    host = NODE * machine.host_memory_per_node.value
    network = Sourced(value=2.5e10, source=f"{NOTES}: 25 GB/s of all-to-all, measured")
    return machine.replace(
        devices_per_node=Sourced(value=NODE, source=f"{NOTES}: four to a node"),
        host_memory_per_node=machine.host_memory_per_node.replace(value=host),
        between_nodes=machine.between_nodes.replace(bytes_per_s=network),
    )


def request(name: str, *, space: PlanSpace = SPACE) -> PlanRequest:
    """Return the question for a model."""
    precision = BFloat16(gradients="float32")
    return PlanRequest(name=name, model=model_config(name), space=space, precision=precision)


@cache
def planner(name: str) -> PlanModel:
    """Return the plan model of a model on these nodes."""
    asked = request(name)
    inventory = inventory_of(asked.model, trainable=asked.trainable)
    return plan_model(asked, inventory=inventory, machine=nodes_of_four())


def forecast(name: str, *, tensor: int, expert: int, streamed: bool = False) -> PlanForecast:
    """Return a plan as they ran it: with all on the device under ZeRO 1, or with streamed experts.

    They keep states on the devices then, a share of each expert's on the ranks that have copies;
    here the states of streamed weights are on the host, whole.
    """
    data, rows = RANKS // tensor, SPACE.max_micro_rows
    degrees = Degrees(1, data, 1, tensor, expert, 1, rows, ROWS // data // rows)
    zero, memory = (0, WEIGHTS_AND_STATES_ON_HOST) if streamed else (1, RESIDENT)
    return planner(name).forecast(
        CompletePlan(degrees, Option(zero, memory, NoActivationCheckpointing()))
    )


def tokens_per_second(found: PlanForecast) -> float:
    """Return the tokens of a device per second."""
    return ROWS * SPACE.target / found.time.total / RANKS
