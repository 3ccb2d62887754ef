"""Shrink the config of a run: the same structure with small sizes, for a fast comparison of plans.

Unchanged are what decides whether a plan is correct: which layers have experts, their rules, top-k,
capacity, shared experts, numbers of heads, tied embeddings and the optimizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from moesaic.core.errors import ConfigError
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.mixer_pattern import parse_pattern
from moesaic.moe.config import MoE, SparseLayer
from moesaic.nn.feed_forward import FeedForwardConfig, ReGLU, ReLU, SquaredReLU, SwiGLU
from moesaic.optim.lr_schedule import Constant
from moesaic.optim.optimizer import AdamW, Float32States, Muon, Optimizer
from moesaic.parallel.precision import Float32
from moesaic.train.run import Run
from moesaic.verify.synthetic_batches import VOCABULARY

DIM, HEAD_DIM, HIDDEN = 32, 4, 32
EXPERTS = (8, 16, 32, 64)
EPS = 1e-3
CLIP = 0.5
MICRO_BATCHES = 4  # the fewest for two ranks of two stages each, or four of one


@dataclass(frozen=True, slots=True)
class ShrunkRun:
    """The run, and ``key: before -> after`` of each changed key."""

    run: Run
    changes: tuple[str, ...]


def shrink_config(run: Run) -> ShrunkRun:
    """Return a run with the same rules whose steps take milliseconds.

    It computes in float32, states included, so that plans differ in the order of sums only. It
    clips gradients above a norm of 0.5, so that clipping occurs; its learning rate is constant.
    AdamW divides by ``sqrt(v) + eps``: with an eps far below the gradients its first steps are
    their signs, and a gradient of 1e-9 that another order of sums makes -1e-9 would change its
    weight the other way. ``eps`` is therefore raised to 1e-3, in the reference too. For the same
    reason ReLU becomes its square and ReGLU SwiGLU: the derivative of ReLU jumps at 0, where
    another order of sums changes signs.
    """
    model = _shrink_model(run.model)
    shrunk = run.replace(
        model=model,
        data=run.data.shrink(vocab_size=VOCABULARY),
        optimizer=_raise_eps(run.optimizer),
        schedule=Constant(),
        clip_norm=min(run.clip_norm, CLIP),
        gradient_accumulation_steps=MICRO_BATCHES,
        precision=Float32(),
    )
    return ShrunkRun(shrunk, tuple(_list_changes(run, shrunk)))


def _shrink_model(config: ModelConfig) -> ModelConfig:
    """Return the model with the narrowest heads and the fewest experts that its rules allow."""
    width = config.attention.head_width(config.dim)
    *smaller, largest = product((min(width, HEAD_DIM), width), EXPERTS)
    for head_dim, experts in smaller:
        try:
            return _narrow_model(config, head_dim=head_dim, experts=experts)
        except ConfigError:  # a rule needs more of them, or a rotary scaling more channels
            continue
    return _narrow_model(config, head_dim=largest[0], experts=largest[1])


def _narrow_model(config: ModelConfig, *, head_dim: int, experts: int) -> ModelConfig:
    hidden, dim = config.feed_forward.hidden, min(config.dim, DIM)
    heads = config.attention.replace(head_dim=head_dim)
    shape = replace(config.mixer_shape("decoder"), dim=dim, attention=heads)
    return config.replace(
        vocab_size=VOCABULARY,
        dim=dim,
        attention=heads,
        mixers={name: mixer.shrink(shape) for name, mixer in config.mixers.items()},
        feed_forward=_shrink_feed_forward(config.feed_forward),
        moe=_shrink_moe(config.moe, experts=experts, dense=hidden),
        encoder=_shrink_stack(config, config.encoder, experts=experts),
        decoder=_shrink_stack(config, config.decoder, experts=experts),
    )


def _shrink_feed_forward(config: FeedForwardConfig) -> FeedForwardConfig:
    smooth = {ReLU: SquaredReLU(), ReGLU: SwiGLU()}.get(type(config.activation))
    return config.replace(hidden=min(config.hidden, HIDDEN), activation=smooth or config.activation)


def _shrink_stack(config: ModelConfig, stack: Stack, *, experts: int) -> Stack:
    """Keep the blocks up to the second MoE block, at least two and those of one whole pattern."""
    sparse = stack.moe_layers
    last = sparse[min(2, len(sparse)) - 1] if sparse else 0
    layers = min(stack.layers, max(2, last + 1, len(parse_pattern(stack.pattern))))
    dense = config.feed_forward.hidden
    fewer = tuple(min(number, experts) for number in stack.experts_per_layer)
    listed = None if stack.sparse_layers is None else tuple(i for i in sparse if i < layers)
    return stack.replace(
        layers=layers,
        sparse_layers=listed,
        experts_per_layer=fewer[: sum(layer < layers for layer in sparse)],
        moe=stack.moe and _shrink_moe(stack.moe, experts=experts, dense=dense),
    )


def _shrink_moe(moe: SparseLayer, *, experts: int, dense: int) -> SparseLayer:
    if not isinstance(moe, MoE):
        return moe
    hidden = moe.hidden
    if hidden is not None:
        hidden = min(hidden, max(8, HIDDEN * hidden // dense // 8 * 8))
    return moe.replace(experts=min(moe.experts, experts), hidden=hidden)


def _raise_eps(optimizer: Optimizer) -> Optimizer:
    match optimizer:
        case AdamW():
            return optimizer.replace(eps=EPS, states=Float32States())
        case Muon():
            return optimizer.replace(adamw=_raise_eps(optimizer.adamw))
    return optimizer


def _list_changes(before: Run, after: Run) -> Iterator[str]:
    old, new = (
        dict(line.split(" = ", 1) for line in run.to_flat_lines()) for run in (before, after)
    )
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}"
