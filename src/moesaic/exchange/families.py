"""All families of models that can be imported and exported, by ``model_type``."""

from moesaic.core.errors import CheckpointError, did_you_mean
from moesaic.exchange.corrected_families import ERNIE4_5_MOE, GLM4_MOE, MINIMAX_M2
from moesaic.exchange.decoder_families import (
    GRANITE,
    GRANITE_MOE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    OLMOE,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
)
from moesaic.exchange.deepseek_families import DEEPSEEK_V2, DEEPSEEK_V3
from moesaic.exchange.encoder_decoder_families import M2M100, NLLB_MOE, SWITCH, T5
from moesaic.exchange.family import Family
from moesaic.exchange.gpt_oss_family import GPT_OSS
from moesaic.exchange.llama4_family import LLAMA4

_SPARSE = (
    *(MIXTRAL, QWEN3_MOE, QWEN2_MOE, OLMOE, GRANITE_MOE, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS),
    *(LLAMA4, GLM4_MOE, MINIMAX_M2, ERNIE4_5_MOE),
)
_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE)
_ENCODER_DECODER = (NLLB_MOE, M2M100, SWITCH, T5)
FAMILIES = {f.model_type: f for f in (*_SPARSE, *_DENSE, *_ENCODER_DECODER)}


def family_of(model_type: object, *, where: str = "config.json") -> Family:
    """Return the family of a ``model_type``. Raises CheckpointError that says ``where`` it is."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        hint = did_you_mean(str(model_type), FAMILIES)
        found = f"{where}: found model_type {model_type!r:.60}"
        raise CheckpointError(f"{found}, expected one of {known}{hint}")
    return FAMILIES[model_type]
