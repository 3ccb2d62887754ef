"""Tensor names of torchtitan: its checkpoints' tensors by the names that Hugging Face gives them.

The names are those of its ``state_dict_adapter.py`` for Llama 3, Qwen3 and DeepSeek-V3, and those
of 2025 before (``output``, ``moe.experts.w1``, ``attention.wq``).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.core.shapes import Tensor
from moesaic.exchange.tensor_files import ReadableTensor
from moesaic.exchange.tensor_table import Shape

EMBEDDING = "tok_embeddings.weight"
WRAPPERS = ("", "model.", "app.model.", "state_dict.")  # in front of all names of a model
_OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "output.weight": "lm_head.weight",
}
_MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # of a gated feed-forward
_IN_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{
        f"attention.{within}w{part}.weight": f"self_attn.{part}_proj.weight"
        for part in "qkvo"
        for within in ("", "qkv_linear.")
    },
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.wq_a.weight": "self_attn.q_a_proj.weight",
    "attention.wq_b.weight": "self_attn.q_b_proj.weight",
    "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "moe.router.gate.weight": "mlp.gate.weight",
    "moe.expert_bias": "mlp.gate.e_score_correction_bias",
    "moe.expert_bias_E": "mlp.gate.e_score_correction_bias",
    **{
        f"{block}.{ours}.weight": f"mlp.{inside}{theirs}.weight"
        for block, inside in (("feed_forward", ""), ("moe.shared_experts", "shared_experts."))
        for ours, theirs in _MATRICES.items()
    },
}
_ROTATED = {  # the key of the number of heads
    "self_attn.q_proj.weight": "num_attention_heads",
    "self_attn.k_proj.weight": "num_key_value_heads",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"moe\.(?:routed_experts\.inner_)?experts\.(w[123])(?:_EFD|_EDF)?")


@dataclass(frozen=True, slots=True)
class _OfExpert:
    """The matrix of one expert of a tensor [experts, rows, columns]."""

    every: ReadableTensor
    expert: int

    @property
    def shape(self) -> Shape:
        return self.every.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.every.dtype

    def read(self, offset: Shape, shape: Shape) -> Tensor:
        return self.every.read((self.expert, *offset), (1, *shape))[0]


@dataclass(frozen=True, slots=True)
class _RotatedHalves:
    """Queries or keys whose rotary pairs are neighbours there, and halves of a head here."""

    pairs: ReadableTensor
    heads: int

    @property
    def shape(self) -> Shape:
        return self.pairs.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.pairs.dtype

    def read(self, offset: Shape, shape: Shape) -> Tensor:
        """Return a box, of the heads that have rows in it."""
        size, end = self.shape[0] // self.heads, offset[0] + shape[0]
        first, last = offset[0] // size * size, -(-end // size) * size
        rows = self.pairs.read((first, *offset[1:]), (last - first, *shape[1:]))
        halves = rows.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).reshape(rows.shape)
        return halves[offset[0] - first : end - first]


def hugging_face_tensors(
    tensors: Mapping[str, ReadableTensor], theirs: Mapping[str, Any]
) -> Iterator[tuple[str, ReadableTensor]]:
    """Yield tensors with their names in Hugging Face; a name that is not torchtitan's stays.

    ``theirs`` is the config of the model. A wrapper around all names of the model is removed. A
    name comes twice if two tensors have it.
    """
    known = (EMBEDDING, *_OUTSIDE.values())
    wrapper = max(WRAPPERS, key=lambda w: (sum(w + name in tensors for name in known), -len(w)))
    is_torchtitan = wrapper + EMBEDDING in tensors or EMBEDDING in tensors
    for name, tensor in tensors.items():
        inner = name.removeprefix(wrapper)
        if is_torchtitan:
            yield from _renamed(inner, tensor, theirs)
        else:
            yield inner, tensor


def _renamed(
    name: str, tensor: ReadableTensor, theirs: Mapping[str, Any]
) -> Iterator[tuple[str, ReadableTensor]]:
    if (found := _LAYER.fullmatch(name)) is None:
        yield _OUTSIDE.get(name, name), tensor
        return
    layer, inside = f"model.layers.{found[1]}.", found[2]
    if (experts := _EXPERTS.fullmatch(inside)) is not None and len(tensor.shape) == 3:
        for expert in range(tensor.shape[0]):
            matrix = _MATRICES[experts[1]]
            yield f"{layer}mlp.experts.{expert}.{matrix}.weight", _OfExpert(tensor, expert)
        return
    new = _IN_LAYER.get(inside)
    if new is None:
        yield name, tensor  # unexpected, and named as it is there
        return
    if theirs.get("kv_lora_rank") and new == "self_attn.q_norm.weight":
        new = "self_attn.q_a_layernorm.weight"
    if theirs.get("model_type") == "llama" and new in _ROTATED and tensor.shape:
        heads = theirs.get(_ROTATED[new]) or theirs.get("num_attention_heads")
        if isinstance(heads, int) and heads > 0 and tensor.shape[0] % (2 * heads) == 0:
            tensor = _RotatedHalves(tensor, heads)
    yield layer + new, tensor
