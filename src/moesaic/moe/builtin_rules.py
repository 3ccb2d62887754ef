"""Members: every rule of the house, in one list per family.

Importing a class is what makes it a word in configs; importing this module imports them all.
"""

from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.moe.balance import (
    DeviceBalance,
    EntropyBalance,
    GlobalBatchBalance,
    ImportanceBalance,
    MicroBatchBalance,
    MutualInformationBalance,
    SequenceBalance,
    TargetLoadBalance,
)
from moesaic.moe.balance_stateful import AdaptiveBalance, BiasUpdate, NullBalance
from moesaic.moe.cross_layer_router import DecoupledRouting, PreGatedRouting, RecurrentRouting
from moesaic.moe.dispatch_projection import DownProjection
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.product_key_memory import ProductKeyMemory
from moesaic.moe.router_logits import HiddenStateAndTag, HiddenStateAndToken, TagOnly, TokenOnly
from moesaic.moe.router_noise import StochasticWarmup
from moesaic.moe.select import AllExperts, Hash, NullTopK, SigmoidTopK, TopGroups
from moesaic.moe.select_dynamic import (
    AllAtInference,
    DenseAll,
    ExpertChoice,
    Threshold,
    ThresholdAtInference,
    TopKAtInference,
    TopP,
)
from moesaic.moe.shared_experts import GatedSharedExperts, ResidualExpert, SharedExperts
from moesaic.moe.soft_moe import SoftMoE

SELECTS = (
    DenseAll,
    ExpertChoice,
    Hash,
    NullTopK,
    SigmoidTopK,
    Threshold,
    TopP,
)
INFERENCES = (AllAtInference, ThresholdAtInference, TopKAtInference)
EXPERT_GROUPS = (AllExperts, TopGroups)
BALANCES = (
    AdaptiveBalance,
    BiasUpdate,
    DeviceBalance,
    EntropyBalance,
    GlobalBatchBalance,
    ImportanceBalance,
    TargetLoadBalance,
    MicroBatchBalance,
    MutualInformationBalance,
    NullBalance,
    SequenceBalance,
)
NOISES = (StochasticWarmup,)
ATTENTION_EXPERTS = (MixtureOfAttention,)
SPARSE_LAYERS = (
    ProductKeyMemory,
    SoftMoE,
)
EXPERTS = (LoRAExpert,)
SHARED_EXPERT_BRANCHES = (
    SharedExperts,
    GatedSharedExperts,
    ResidualExpert,
)
DISPATCH_PROJECTIONS = (DownProjection,)
ROUTER_INPUTS = (
    HiddenStateAndTag,
    HiddenStateAndToken,
    TagOnly,
    TokenOnly,
)
CROSS_LAYER_ROUTINGS = (
    DecoupledRouting,
    PreGatedRouting,
    RecurrentRouting,
)
