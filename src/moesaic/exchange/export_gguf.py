"""Export to GGUF: a decoder as one file that llama.cpp reads, written some rows at a time.

A model that a family of transformers can hold is written under the names of ``gguf_families.py``.
Needs the package ``gguf`` (``pip install "moesaic[gguf]"``).
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.safetensors_io import tensor_bytes
from moesaic.core.errors import CheckpointError, UserError
from moesaic.core.files import new_directory
from moesaic.core.shapes import Tensor
from moesaic.exchange.config_entries import LENGTH
from moesaic.exchange.config_mapping import field_of
from moesaic.exchange.export_model import (
    DEFAULT_LENGTH,
    ExportedModel,
    open_for_export,
)
from moesaic.exchange.gguf_families import LAYOUT, gguf_architecture
from moesaic.exchange.gguf_tokenizer import GGUFTokens, gguf_tokens
from moesaic.exchange.same_model import resolved
from moesaic.exchange.tensor_files import PutTogether, TensorFiles
from moesaic.model.config import ModelConfig
from moesaic.moe.config import MoE
from moesaic.moe.shared_experts import GatedSharedExperts
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.rotary_scaling import LinearScaling, Llama3Scaling, NoRotaryScaling, YaRN

MODEL_FILE = "model.gguf"
_ROTARY_FACTORS = "rope_freqs.weight"
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor of the file: its shape, its dtype there, and where its values come from."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        """Its size in the file, in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stays_float32(name: str, *, dimensions: int) -> bool:
    """Whether a parameter of ours is float32 in a file of any dtype: norms, biases and routers."""
    return dimensions == 1 or ".router." in name or name.endswith("shared_experts.gate.weight")


def export_gguf(run: Path, *, out: Path, dtype: torch.dtype | None = None) -> ExportedModel:
    """Write the directory ``out`` with ``model.gguf``: weights, config and tokenizer.

    Args:
        run: The directory of a finished run or of an imported model.
        out: Must not exist yet.
        dtype: Of matrices (float32, float16, bfloat16); None: that of the weights; see
            ``stays_float32``.

    Raises:
        CheckpointError: llama.cpp computes no such model; the first part is named.
        FileError: ``out`` exists.
        UserError: The package ``gguf`` is not installed.
    """
    gguf = _gguf()
    source = open_for_export(run)
    directory, of, before = source.run, source.family, source.before
    architecture = gguf_architecture(of)
    model = resolved(source.model)
    architecture.require_computable(model)
    pieces = architecture.family(of).pieces(model, layout=LAYOUT)
    put_together = PutTogether([p.reversed() for p in pieces], TensorFiles([directory.model]))
    exact = {
        piece.source.name
        for piece in pieces
        if stays_float32(piece.target.name, dimensions=len(piece.target.shape))
    }
    tensors = [
        GGUFTensor(
            name,
            tuple(target.shape),
            torch.float32 if name in exact else dtype or target.dtype,
            partial(put_together, name),
        )
        for name, target in put_together.targets.items()
    ]
    tensors += _rotary_factors(model)
    tokens = gguf_tokens(directory, rows=model.vocab_size)
    with new_directory(out) as part:
        writer = gguf.GGUFWriter(part / MODEL_FILE, architecture.name)
        writer.add_name(directory.path.resolve().name)
        _add_config(gguf, writer, model, length=before.get(LENGTH) or DEFAULT_LENGTH)
        _add_tokens(writer, tokens)
        _write(gguf, writer, tensors)
    size = sum(tensor.bytes for tensor in tensors)
    return ExportedModel(of.model_type, architecture.name, len(tensors), size, tokens.notes)


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError('an export to GGUF needs: pip install "moesaic[gguf]"') from error


def _rotary_factors(model: ModelConfig) -> list[GGUFTensor]:
    """Return by what llama.cpp divides the angle of each pair of channels, if by anything."""
    position = model.position
    if not isinstance(position, Rotary) or not isinstance(position.scaling, Llama3Scaling):
        return []
    pairs = position.rotated_channels(model.head_dim) // 2
    plain, scaled = (
        scaling.frequencies(pairs, theta=position.theta, length=None, device=torch.device("cpu"))
        for scaling in (NoRotaryScaling(), position.scaling)
    )
    factors = (plain / scaled)[0]
    return [GGUFTensor(_ROTARY_FACTORS, (pairs,), torch.float32, lambda: iter([factors]))]


def _add_config(gguf: Any, writer: Any, model: ModelConfig, *, length: int) -> None:
    """Add the sizes of a resolved model, and how it rotates."""
    heads, position = model.attention, model.position
    writer.add_context_length(length)
    writer.add_embedding_length(model.dim)
    writer.add_block_count(model.decoder.layers)
    writer.add_head_count(heads.heads)
    writer.add_head_count_kv(heads.num_kv_heads())
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(field_of(model, "norm.eps"))
    writer.add_feed_forward_length(model.feed_forward.hidden)
    writer.add_vocab_size(model.vocab_size)
    assert isinstance(position, Rotary)
    writer.add_rope_freq_base(position.theta)
    writer.add_rope_dimension_count(position.rotated_channels(model.head_dim))
    match position.scaling:
        case LinearScaling(factor=factor):
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(factor)
        case YaRN() as yarn:
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(yarn.factor)
            writer.add_rope_scaling_orig_ctx_len(yarn.original_length)
            writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
        case _:
            pass
    if isinstance(model.moe, MoE):
        shared = model.moe.shared_experts
        writer.add_expert_count(model.moe.experts)
        writer.add_expert_used_count(int(model.moe.select.experts_per_token(model.moe.experts)))
        writer.add_expert_feed_forward_length(model.moe.hidden)
        if isinstance(shared, GatedSharedExperts):
            writer.add_expert_shared_feed_forward_length(shared.number * (model.moe.hidden or 0))


def _add_tokens(writer: Any, tokens: GGUFTokens) -> None:
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pattern)
    writer.add_token_list(tokens.names)
    writer.add_token_types(tokens.types)
    if tokens.model == "llama":
        writer.add_token_scores(tokens.scores or [0.0] * len(tokens.names))
    if tokens.merges:
        writer.add_token_merges(tokens.merges)
    writer.add_add_space_prefix(tokens.space_prefix)
    roles = dict(tokens.roles)
    writer.add_add_bos_token(tokens.start is not None)
    writer.add_add_eos_token(value=False)
    if tokens.start is not None:
        roles["bos"] = tokens.start
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if role in roles:
            add(roles[role])


def _write(gguf: Any, writer: Any, tensors: list[GGUFTensor]) -> None:
    """Write the file; a tensor's values go straight to it, chunk by chunk."""
    for tensor in tensors:
        kind = getattr(gguf.GGMLQuantizationType, _KINDS[tensor.dtype])
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    stream = writer.fout[0]
    for tensor in tensors:
        writer.write_padding(stream, stream.tell())
        for chunk in tensor.chunks():
            values = chunk.to(tensor.dtype).contiguous()
            if not values.isfinite().all():
                raise CheckpointError(
                    f"{tensor.name}: found values that {tensor.dtype} cannot hold"
                )
            stream.write(tensor_bytes(values))
            del chunk, values  # before the next ones are made
        writer.write_padding(stream, stream.tell())
    writer.close()
