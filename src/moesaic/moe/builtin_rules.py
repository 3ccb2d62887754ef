"""Built-in rules: imports every module of ``moe`` that defines ``Choice`` classes.

Defining such a class registers its name, so its module must be imported before a config is read.
"""

# pyright: reportUnusedImport=false
import moesaic.moe.attention_experts
import moesaic.moe.balance_stateful
import moesaic.moe.config
import moesaic.moe.cross_layer_router
import moesaic.moe.product_key_memory
import moesaic.moe.select_dynamic
import moesaic.moe.soft_moe  # noqa: F401
