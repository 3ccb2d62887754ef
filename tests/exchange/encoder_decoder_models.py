"""Small encoder-decoders of transformers with random weights, one for each family and variant."""

from dataclasses import dataclass, field
from typing import Any

import torch

from moesaic.exchange.transformers_repairs import repair_forward

M2M_SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "attn_implementation": "eager",
}
T5_SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 40,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "attn_implementation": "eager",
}
NLLB = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
SWITCH = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}


@dataclass(frozen=True)
class TheirModel:
    """A class of transformers and what its config says; ``sparse`` models have experts."""

    name: str
    sizes: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    sparse: bool = False
    untied: bool = False

    @property
    def std(self) -> float:
        return 0.2 if self.sizes is M2M_SIZES else 0.1

    def build(self) -> Any:
        """Return the model with weights away from their initial values."""
        import transformers

        config = getattr(transformers, f"{self.name}Config")(**self.sizes | self.changes)
        model = getattr(transformers, f"{self.name}ForConditionalGeneration")(config).eval()
        if self.untied:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                one = parameter.dim() == 1
                # scores of T5 are not divided, and sharper
                parameter.normal_(1.0 if one else 0.0, 0.3 if one else self.std)
        repair_forward(model)
        return model


MODELS = {
    "m2m_100": TheirModel("M2M100", M2M_SIZES),
    "m2m_100, gelu, unscaled": TheirModel(
        "M2M100", M2M_SIZES, {"activation_function": "gelu", "scale_embedding": False}
    ),
    "nllb-moe": TheirModel("NllbMoe", M2M_SIZES, NLLB, sparse=True),
    "nllb-moe, by token, half a capacity": TheirModel(
        "NllbMoe",
        M2M_SIZES,
        NLLB
        | {
            "batch_prioritized_routing": True,
            "moe_eval_capacity_token_fraction": 0.25,
            "moe_token_dropout": 0.0,
        },
        sparse=True,
    ),
    "nllb-moe, normalised before": TheirModel(
        "NllbMoe",
        M2M_SIZES,
        NLLB
        | {
            "normalize_router_prob_before_dropping": True,
            "moe_eval_capacity_token_fraction": 0.375,
            "second_expert_policy": "all",
        },
        sparse=True,
    ),
    "t5": TheirModel("T5", T5_SIZES),
    "t5 1.1": TheirModel(
        "T5",
        T5_SIZES,
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        untied=True,
    ),
    "switch": TheirModel("SwitchTransformers", T5_SIZES, SWITCH, sparse=True),
    "switch, three edges in a row": TheirModel(
        "SwitchTransformers", T5_SIZES, SWITCH | {"expert_capacity": 3}, sparse=True
    ),
}
DROPS = (
    "nllb-moe, by token, half a capacity",
    "nllb-moe, normalised before",
    "switch, three edges in a row",
)
