"""Members: every rule of the house, in one list per family.

Importing a class is what makes it a word in configs; importing this module imports them all.
"""

from moesaic.moe.among import AllExperts, BestGroups
from moesaic.moe.attention import MixtureOfAttention
from moesaic.moe.balances.adamoe import NullBalance
from moesaic.moe.balances.adaptive import AdaptiveBalance
from moesaic.moe.balances.bias import BiasUpdate
from moesaic.moe.balances.device import DeviceBalance
from moesaic.moe.balances.entropy import EntropyBalance
from moesaic.moe.balances.global_batch import GlobalBatchBalance, MicroBatchBalance
from moesaic.moe.balances.importance import Importance
from moesaic.moe.balances.kept_fraction import KeptFraction
from moesaic.moe.balances.mutual_information import MutualInformation
from moesaic.moe.balances.sequence import SequenceBalance
from moesaic.moe.bodies.lora import LoRAExpert
from moesaic.moe.bodies.memory import ProductKeyMemory
from moesaic.moe.bodies.narrow import Narrow
from moesaic.moe.bodies.residual import Residual
from moesaic.moe.bodies.shared import GatedSharedExperts, SharedExperts
from moesaic.moe.bodies.soft import SoftMixture
from moesaic.moe.conditions.embeddings import OnlyTag, OnlyToken, OnTag, OnToken
from moesaic.moe.links.decoupled import Decoupled
from moesaic.moe.links.pre_gated import PreGated
from moesaic.moe.links.recurrent import Recurrent
from moesaic.moe.noises.warm_up import StochasticWarmUp
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
AMONG = (AllExperts, BestGroups)
BALANCES = (
    AdaptiveBalance,
    BiasUpdate,
    DeviceBalance,
    EntropyBalance,
    GlobalBatchBalance,
    Importance,
    KeptFraction,
    MicroBatchBalance,
    MutualInformation,
    NullBalance,
    SequenceBalance,
)
NOISES = (StochasticWarmUp,)
ATTENTION = (MixtureOfAttention,)
SPARSE = (
    ProductKeyMemory,
    SoftMixture,
)
EXPERTS = (LoRAExpert,)
BESIDES = (
    SharedExperts,
    GatedSharedExperts,
    Residual,
)
EXCHANGES = (Narrow,)
CONDITIONS = (
    OnTag,
    OnToken,
    OnlyTag,
    OnlyToken,
)
LINKS = (
    Decoupled,
    PreGated,
    Recurrent,
)
