"""Built-in rules: imports every module of ``moe`` whose classes a config may name.

Defining a ``Choice`` class registers it, so its module must be imported before a config is read.
"""

from moesaic.moe import (
    attention_experts,
    balance,
    balance_stateful,
    config,
    cross_layer_router,
    product_key_memory,
    select_dynamic,
    soft_moe,
)

MODULES = (
    attention_experts,
    balance,
    balance_stateful,
    config,
    cross_layer_router,
    product_key_memory,
    select_dynamic,
    soft_moe,
)
