"""Built-in rules: imports every module of ``moe`` that defines ``Choice`` classes.

Defining such a class registers its name, so its module must be imported before a config is read.
"""

# pyright: reportUnusedImport=false
import moesaic.moe.adaptive_auxiliary_losses
import moesaic.moe.attention_experts
import moesaic.moe.config
import moesaic.moe.cross_layer_router
import moesaic.moe.expert_bias
import moesaic.moe.expert_selection_dynamic
import moesaic.moe.product_key_memory
import moesaic.moe.soft_moe  # noqa: F401
