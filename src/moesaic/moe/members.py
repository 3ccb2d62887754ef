"""Members: every rule of the house, in one list per family.

Importing a class is what makes it a word in configs; importing this module imports them all.
"""

from moesaic.moe.attention import MixtureOfAttention
from moesaic.moe.bodies.lora import LoRAExpert
from moesaic.moe.bodies.memory import ProductKeyMemory
from moesaic.moe.bodies.narrow import Narrow
from moesaic.moe.bodies.residual import Residual
from moesaic.moe.bodies.shared import GatedSharedExperts, SharedExperts

ATTENTION = (MixtureOfAttention,)
SPARSE = (ProductKeyMemory,)
EXPERTS = (LoRAExpert,)
BESIDES = (
    SharedExperts,
    GatedSharedExperts,
    Residual,
)
EXCHANGES = (Narrow,)
