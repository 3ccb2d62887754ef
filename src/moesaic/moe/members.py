"""Members: every rule of the house, in one list per family.

Importing a class is what makes it a word in configs; importing this module imports them all.
"""

from moesaic.moe.among import AllExperts, TopGroups
from moesaic.moe.attention import MixtureOfAttention
from moesaic.moe.balances.adamoe import NullBalance
from moesaic.moe.balances.adaptive import AdaptiveBalance
from moesaic.moe.balances.bias import BiasUpdate
from moesaic.moe.balances.device import DeviceBalance
from moesaic.moe.balances.entropy import EntropyBalance
from moesaic.moe.balances.global_batch import GlobalBatchBalance, MicroBatchBalance
from moesaic.moe.balances.importance import ImportanceBalance
from moesaic.moe.balances.kept_fraction import TargetLoadBalance
from moesaic.moe.balances.mutual_information import MutualInformationBalance
from moesaic.moe.balances.sequence import SequenceBalance
from moesaic.moe.bodies.lora import LoRAExpert
from moesaic.moe.bodies.memory import ProductKeyMemory
from moesaic.moe.bodies.narrow import DownProjection
from moesaic.moe.bodies.residual import ResidualExpert
from moesaic.moe.bodies.shared import GatedSharedExperts, SharedExperts
from moesaic.moe.bodies.soft import SoftMoE
from moesaic.moe.conditions.embeddings import TagOnly, TokenOnly, HiddenStateAndTag, HiddenStateAndToken
from moesaic.moe.links.decoupled import DecoupledRouting
from moesaic.moe.links.pre_gated import PreGatedRouting
from moesaic.moe.links.recurrent import RecurrentRouting
from moesaic.moe.noises.warm_up import StochasticWarmup
from moesaic.moe.selects.dense_all import (
    AllAtInference,
    DenseAll,
    ThresholdAtInference,
    TopKAtInference,
)
from moesaic.moe.selects.expert_choice import ExpertChoice
from moesaic.moe.selects.hash import Hash
from moesaic.moe.selects.null_top_k import NullTopK
from moesaic.moe.selects.sigmoid import SigmoidTopK
from moesaic.moe.selects.threshold import Threshold
from moesaic.moe.selects.top_p import TopP

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
