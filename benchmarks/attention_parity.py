"""Attention of public models, in transformers and in moesaic with the same random weights.

Tiny models of each family, with dense feed-forwards in place of experts. Prints the largest
difference of logits over all positions, and of decoding token by token from a prompt against
transformers' full pass (beyond the original length dynamic scaling differs there by definition: a
full pass rotates earlier keys anew). Run it with a Python that has transformers, and moesaic:

    PYTHONPATH=src /path/to/venv/bin/python benchmarks/attention_parity.py
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from support import write_result
from torch import nn

from moesaic.data.batch import IGNORE_LABEL, Batch, InputRows
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.nn.attention import Attention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.attention_parts import Chunks, LearnedSinks, SlidingWindow
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.nn.latent_attention import LatentAttention
from moesaic.nn.norm import RMSNorm
from moesaic.nn.positional_encoding import NoPositionalEncoding, RelativeBias, Rotary
from moesaic.nn.qk_norm import AcrossHeadsQKNorm, L2QKNorm, PerHeadQKNorm
from moesaic.nn.rotary_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    RotaryScaling,
    YaRN,
)

VOCABULARY, DIM, HIDDEN, LAYERS, ROWS, LENGTH, PROMPT = 96, 64, 80, 4, 2, 40, 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
HEADS = AttentionConfig(heads=4, kv_heads=2)
HALVES = Rotary(pairing="halves")
Copy = Callable[[nn.Module, Any], None]


class DenseSwiGLU(nn.Module):
    """What stands in for the experts; GPT-OSS reads a pair."""

    def __init__(self, *, pair: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.pair = nn.Linear(DIM, 2 * HIDDEN), nn.Linear(HIDDEN, DIM), pair
        self.up.bias, self.down.bias = None, None

    def forward(self, x: torch.Tensor) -> Any:
        gate, value = self.up(x).chunk(2, -1)
        out = self.down(nn.functional.silu(gate) * value)
        return (out, None) if self.pair else out


@dataclass(frozen=True)
class Family:
    """A model of transformers, and the config of moesaic for it."""

    theirs: Callable[[], nn.Module]
    attention: AttentionConfig = HEADS
    position: Any = HALVES
    mixers: dict[str, Any] = field(default_factory=dict)
    pattern: str = "attention"
    copy: Copy | None = None
    mlp: str = "mlp"
    pair: bool = False


def causal(name: str, config_name: str = "", **changes: Any) -> Callable[[], nn.Module]:
    """Return a maker of a decoder of transformers."""
    config = getattr(transformers, config_name or f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")
    return lambda: model(config(**(SIZES | changes)))


def llama(rope: dict[str, Any], scaling: RotaryScaling, *, longest: int = 64) -> Family:
    parameters = {"rope_theta": 10000.0} | rope
    theirs = causal("Llama", rope_parameters=parameters, max_position_embeddings=longest)
    return Family(theirs, position=HALVES.replace(scaling=scaling))


def copy_heads(ours: Any, theirs: Any) -> None:
    """Copy q, k, v and o with their biases, norms of queries and keys, and sinks."""
    parts = [theirs.q_proj, theirs.k_proj, theirs.v_proj]
    ours.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
    ours.out.weight.copy_(theirs.o_proj.weight)
    if ours.qkv.bias is not None:
        ours.qkv.bias.copy_(torch.cat([part.bias for part in parts if part.bias is not None]))
    if ours.out.bias is not None:
        ours.out.bias.copy_(theirs.o_proj.bias)
    if ours.qk_norm is not None and list(ours.qk_norm.parameters()):
        ours.qk_norm.query.weight.copy_(theirs.q_norm.weight)
        ours.qk_norm.key.weight.copy_(theirs.k_norm.weight)
    if ours.sinks is not None:
        ours.sinks.copy_(theirs.sinks)


def copy_latent(ours: Any, theirs: Any) -> None:
    pairs = [
        (ours.kv_down, theirs.kv_a_proj_with_mqa),
        (ours.kv_norm, theirs.kv_a_layernorm),
        (ours.kv_up, theirs.kv_b_proj),
        (ours.out, theirs.o_proj),
    ]
    if ours.query_down is None:
        pairs += [(ours.query_up, theirs.q_proj)]
    else:
        pairs += [
            (ours.query_down, theirs.q_a_proj),
            (ours.query_norm, theirs.q_a_layernorm),
            (ours.query_up, theirs.q_b_proj),
        ]
    for one, other in pairs:
        one.weight.copy_(other.weight)


def deepseek(rank: int | None) -> Family:
    widths = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    }
    theirs = causal(
        "DeepseekV3",
        **widths,
        q_lora_rank=rank,
        num_key_value_heads=4,
        first_k_dense_replace=LAYERS,
        rope_parameters=rope,
    )
    yarn = YaRN(factor=8, original_length=16, mscale=1.0, mscale_all_dim=0.7)
    latent = LatentAttention(
        kv_rank=24,
        query_rank=rank,
        nope_dim=12,
        rope_dim=8,
        value_dim=10,
        position=Rotary(scaling=yarn),
    )
    heads = AttentionConfig(heads=4)
    return Family(theirs, heads, Rotary(), {"latent": latent}, "latent", copy_latent)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GPT_OSS_YARN = YARN | {"rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"window": Attention(window=SlidingWindow(size=8))}
FAMILIES = {
    "Llama": llama({"rope_type": "default"}, HALVES.scaling),
    "Llama, linear": llama({"rope_type": "linear", "factor": 3.0}, LinearScaling(factor=3)),
    "Llama, YaRN": llama(YARN, YaRN(factor=4, original_length=16)),
    "Llama 3.1": llama(LLAMA3, Llama3Scaling(factor=8, original_length=16)),
    "Llama, dynamic": llama(
        {"rope_type": "dynamic", "factor": 2.0},
        DynamicNTKScaling(factor=2, original_length=16),
        longest=16,
    ),
    "Mixtral, window 8": Family(
        causal("Mixtral", sliding_window=8), mixers=WINDOW, pattern="window"
    ),
    "Qwen2, biases of q, k, v": Family(
        causal("Qwen2"), HEADS.replace(bias=("query", "key", "value"))
    ),
    "Qwen3-MoE, head_dim 24": Family(
        causal("Qwen3Moe", head_dim=24), HEADS.replace(head_dim=24, qk_norm=PerHeadQKNorm())
    ),
    "OLMoE, clip 0.5": Family(
        causal("Olmoe", clip_qkv=0.5), HEADS.replace(qk_norm=AcrossHeadsQKNorm(), clip=0.5)
    ),
    "GPT-OSS": Family(
        causal("GptOss", head_dim=16, sliding_window=8, rope_parameters=GPT_OSS_YARN),
        HEADS.replace(bias=("query", "key", "value", "output"), sinks=LearnedSinks()),
        HALVES.replace(scaling=YaRN(factor=4, original_length=16, ramp_ends="exact")),
        WINDOW,
        "window, attention",
        pair=True,
    ),
    "DeepSeek-V3": deepseek(20),
    "DeepSeek-V3, no query rank": deepseek(None),
    "Llama 4 text": Family(
        causal(
            "Llama4",
            "Llama4TextConfig",
            head_dim=16,
            attention_chunk_size=8,
            no_rope_layers=[1, 1, 1, 0],
            attn_temperature_tuning=False,
            use_qk_norm=True,
            intermediate_size_mlp=HIDDEN,
        ),
        HEADS,
        Rotary(),
        {
            "chunk": Attention(window=Chunks(size=8), qk_norm=L2QKNorm()),
            "nope": Attention(position=NoPositionalEncoding()),
        },
        "chunk, chunk, chunk, nope",
        mlp="feed_forward",
        pair=True,
    ),
}


def model_of(family: Family) -> Transformer:
    stack = Stack(layers=LAYERS, moe_every=0, pattern=family.pattern)
    return Transformer(
        ModelConfig(
            vocab_size=VOCABULARY,
            dim=DIM,
            encoder=Stack(layers=0),
            decoder=stack,
            attention=family.attention,
            feed_forward=FeedForwardConfig(hidden=HIDDEN),
            norm=RMSNorm(eps=1e-6),
            position=family.position,
            embedding=EmbeddingConfig(tied=False, scaled=False),
            mixers=family.mixers,
        )
    ).eval()


@torch.no_grad()
def pair_of(family: Family) -> tuple[nn.Module, Transformer]:
    """Return both models, with the same weights, drawn away from their initial values."""
    theirs, ours = family.theirs(), model_of(family)
    base: Any = theirs.model
    for layer in base.layers:
        setattr(layer, family.mlp, DenseSwiGLU(pair=family.pair))
    for parameter in theirs.parameters():
        parameter.normal_(
            1.0 if parameter.dim() == 1 else 0.0, 0.3 if parameter.dim() == 1 else 0.15
        )
    theirs.eval()
    ours.embedding.weight.copy_(base.embed_tokens.weight)
    ours.embedding.output.copy_(theirs.lm_head.weight)
    ours.decoder_norm.weight.copy_(base.norm.weight)
    for block, layer in zip(ours.decoder, base.layers, strict=True):
        mixer: Any = block.mixer_branches[0]
        mixer.norm.weight.copy_(layer.input_layernorm.weight)
        (family.copy or copy_heads)(mixer.inner, layer.self_attn)
        block.feed_forward.norm.weight.copy_(layer.post_attention_layernorm.weight)
        dense = getattr(layer, family.mlp)
        block.feed_forward.inner.up.weight.copy_(dense.up.weight)
        block.feed_forward.inner.down.weight.copy_(dense.down.weight)
    return theirs, ours


def decode(
    ours: Transformer, rows: torch.Tensor, encoded: Any = None, *, prompt: int
) -> torch.Tensor:
    """Return the logits of every token from the last one of the prompt on, token by token."""
    cache = ours.init_cache(encoded, rows=rows.shape[0])
    found = [ours.step(InputRows.full(rows[:, :prompt]), cache)]
    for at in range(prompt, rows.shape[1]):
        found.append(ours.step(InputRows.full(rows[:, at : at + 1]), cache))
    return torch.stack(found, 1)


@torch.no_grad()
def compare(family: Family) -> dict[str, float]:
    torch.manual_seed(0)
    theirs, ours = pair_of(family)
    rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    want = theirs(input_ids=rows).logits
    batch = Batch(InputRows.empty(ROWS), InputRows.full(rows), rows, {}, torch.zeros(ROWS).long())
    got = ours.predict(ours(batch).hidden).view_as(want)
    steps = decode(ours, rows, prompt=PROMPT)
    return {
        "largest logit": want.abs().max().item(),
        "full pass": (got - want).abs().max().item(),
        "token by token": (steps - want[:, PROMPT - 1 :]).abs().max().item(),
    }


@torch.no_grad()
def compare_t5() -> dict[str, float]:
    """An encoder-decoder with relative biases; T5's scores have no scale."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=DIM,
        d_kv=12,
        d_ff=HIDDEN,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=24,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs: Any = transformers.T5ForConditionalGeneration(config).eval()
    for parameter in theirs.parameters():
        parameter.normal_(
            1.0 if parameter.dim() == 1 else 0.0, 0.3 if parameter.dim() == 1 else 0.15
        )
    stack = Stack(layers=2, moe_every=0)
    ours: Any = Transformer(
        ModelConfig(
            vocab_size=VOCABULARY,
            dim=DIM,
            encoder=stack,
            decoder=stack,
            attention=AttentionConfig(heads=4, head_dim=12, scale=1.0),
            feed_forward=FeedForwardConfig(hidden=HIDDEN, activation=ReLU()),
            norm=RMSNorm(eps=1e-6),
            position=RelativeBias(buckets=16, max_distance=24),
            embedding=EmbeddingConfig(tied=False, scaled=False),
        )
    ).eval()
    ours.embedding.weight.copy_(theirs.shared.weight)
    ours.embedding.output.copy_(theirs.lm_head.weight)
    for side, table, blocks in (
        (theirs.encoder, ours.encoder_score_bias, ours.encoder),
        (theirs.decoder, ours.decoder_score_bias, ours.decoder),
    ):
        first = side.block[0].layer[0].SelfAttention
        table.table.weight.copy_(first.relative_attention_bias.weight)
        for block, layer in zip(blocks, side.block, strict=True):
            copy_t5_block(block, layer.layer)
    ours.encoder_norm.weight.copy_(theirs.encoder.final_layer_norm.weight)
    ours.decoder_norm.weight.copy_(theirs.decoder.final_layer_norm.weight)
    source, target = (torch.randint(0, VOCABULARY, (ROWS, length)) for length in (30, LENGTH))
    want = theirs(input_ids=source, decoder_input_ids=target).logits
    batch = Batch(
        InputRows.full(source), InputRows.full(target), target, {}, torch.zeros(ROWS).long()
    )
    got = ours.predict(ours(batch).hidden).view_as(want)
    steps = decode(ours, target, ours.encode(InputRows.full(source)), prompt=PROMPT)
    return {
        "largest logit": want.abs().max().item(),
        "full pass": (got - want).abs().max().item(),
        "token by token": (steps - want[:, PROMPT - 1 :]).abs().max().item(),
    }


def copy_t5_block(block: Any, layers: Any) -> None:
    own, mixer = layers[0].SelfAttention, block.mixer_branches[0]
    mixer.norm.weight.copy_(layers[0].layer_norm.weight)
    mixer.inner.qkv.weight.copy_(torch.cat([own.q.weight, own.k.weight, own.v.weight]))
    mixer.inner.out.weight.copy_(own.o.weight)
    if len(layers) == 3:
        cross, branch = layers[1].EncDecAttention, block.cross_attention
        branch.norm.weight.copy_(layers[1].layer_norm.weight)
        branch.inner.query.weight.copy_(cross.q.weight)
        branch.inner.kv.weight.copy_(torch.cat([cross.k.weight, cross.v.weight]))
        branch.inner.out.weight.copy_(cross.o.weight)
    dense = layers[-1].DenseReluDense
    block.feed_forward.norm.weight.copy_(layers[-1].layer_norm.weight)
    block.feed_forward.inner.up.weight.copy_(dense.wi.weight)
    block.feed_forward.inner.down.weight.copy_(dense.wo.weight)


def main() -> None:
    assert IGNORE_LABEL < 0  # every id of these batches is a label
    results = {}
    for name, family in FAMILIES.items():
        results[name] = compare(family)
        print(name, {key: f"{value:.2g}" for key, value in results[name].items()}, flush=True)
    results["T5"] = compare_t5()
    print("T5", {key: f"{value:.2g}" for key, value in results["T5"].items()})
    out = Path(__file__).parent / "results" / "attention_parity.json"
    write_result(out, {"transformers": transformers.__version__, "families": results})


if __name__ == "__main__":
    main()
