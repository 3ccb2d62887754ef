"""Members: every rule of the house, in one list per family.

Importing a class is what makes it a word in configs; importing this module imports them all.
"""

from moesaic.moe.balances.adaptive import AdaptiveBalance
from moesaic.moe.balances.bias import BiasUpdate
from moesaic.moe.balances.device import DeviceBalance
from moesaic.moe.balances.entropy import EntropyBalance
from moesaic.moe.balances.global_batch import GlobalBatchBalance, MicroBatchBalance
from moesaic.moe.balances.importance import Importance
from moesaic.moe.balances.sequence import SequenceBalance
from moesaic.moe.conditions.embeddings import OnlyTag, OnlyToken, OnTag, OnToken
from moesaic.moe.links.decoupled import Decoupled
from moesaic.moe.links.pre_gated import PreGated
from moesaic.moe.links.recurrent import Recurrent

BALANCES = (
    AdaptiveBalance,
    BiasUpdate,
    DeviceBalance,
    EntropyBalance,
    GlobalBatchBalance,
    Importance,
    MicroBatchBalance,
    SequenceBalance,
)
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
