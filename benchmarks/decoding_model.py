"""Our models of ``decoding.py``: the demo's mixture of experts, and a dense model of its size."""

import torch
from decoding_shape import DECODER, DENSE_HIDDEN, DIM, ENCODER, EXPERT_HIDDEN, EXPERTS, HEADS, VOCAB

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU, SquaredReLU
from moesaic.nn.norm import LayerNorm

TAG = 5  # the forced first token of every answer


def build(*, sparse: bool) -> Transformer:
    torch.manual_seed(0)
    experts = FeedForwardConfig(hidden=EXPERT_HIDDEN, activation=SquaredReLU())
    dense = FeedForwardConfig(hidden=DENSE_HIDDEN, activation=ReLU())  # as M2M-100's
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=DIM,
        encoder=Stack(layers=ENCODER),
        decoder=Stack(layers=DECODER),
        attention=AttentionConfig(heads=HEADS),
        feed_forward=experts if sparse else dense,
        moe=MoE(experts=EXPERTS, select=SwitchTop1()) if sparse else NoMoE(),
        norm=LayerNorm(),
    )
    return Transformer(config).eval()
