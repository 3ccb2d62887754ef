"""Small: a run's config with everything that is only size made small, and its structure kept.

Which layers have experts, their rules, top-k, capacity, shared experts, numbers of heads, tied
tables and the optimizer stay as they are: those decide whether a plan is right. Widths do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.core.errors import ConfigError
from moesaic.model.config import ModelConfig, Stack
from moesaic.moe.config import MoE, SparseLayer
from moesaic.optim.lr_schedule import Constant
from moesaic.optim.optimizer import AdamW, Muon, Optimizer
from moesaic.train.run import Float32, Run
from moesaic.verify.synthetic_batches import VOCABULARY

DIM, HEAD_DIM, HIDDEN = 32, 4, 32
EXPERTS = (8, 16, 32, 64)
EPS = 1e-3
CLIP = 0.5
MICRO_BATCHES = 4  # the fewest that two ranks with two stages each, or four with one, can work on


@dataclass(frozen=True, slots=True)
class ShrunkRun:
    """The run, and ``key: before -> after`` of what was changed."""

    run: Run
    changes: tuple[str, ...]


def shrink_config(run: Run) -> ShrunkRun:
    """Return a run that takes milliseconds a step and makes the same decisions.

    It computes in float32, so that what differs is the order of sums and nothing else. It clips
    where the gradients' norm is above 0.5, so that clipping is at work; its learning rate is whole
    from the first step. AdamW divides by ``sqrt(v) + eps``: with an eps far below the gradients its
    first steps are their signs, and a gradient of 1e-9 that another order of sums makes -1e-9 would
    move its weight the other way. ``eps`` is therefore raised to 1e-3, for the reference as well.
    """
    model = _shrink_model(run.model)
    made = run.replace(
        model=model,
        tokenizer=run.tokenizer.replace(vocab_size=VOCABULARY),
        optimizer=_raise_eps(run.optimizer),
        schedule=Constant(),
        clip_norm=min(run.clip_norm, CLIP),
        gradient_accumulation_steps=MICRO_BATCHES,
        precision=Float32(),
    )
    return ShrunkRun(made, tuple(_list_changes(run, made)))


def _shrink_model(config: ModelConfig) -> ModelConfig:
    """Return it with the fewest experts that its rules take."""
    *fewer, most = EXPERTS
    for experts in fewer:
        try:
            return _narrow_model(config, experts=experts)
        except ConfigError:  # a rule wants more of them
            continue
    return _narrow_model(config, experts=most)


def _narrow_model(config: ModelConfig, *, experts: int) -> ModelConfig:
    heads, hidden = config.attention, config.feed_forward.hidden
    return config.replace(
        vocab_size=VOCABULARY,
        dim=min(config.dim, DIM),
        attention=heads.replace(head_dim=min(heads.head_width(config.dim), HEAD_DIM)),
        feed_forward=config.feed_forward.replace(hidden=min(hidden, HIDDEN)),
        moe=_shrink_moe(config.moe, experts=experts, dense=hidden),
        encoder=_shrink_stack(config, config.encoder, experts=experts),
        decoder=_shrink_stack(config, config.decoder, experts=experts),
    )


def _shrink_stack(config: ModelConfig, stack: Stack, *, experts: int) -> Stack:
    """Keep the blocks up to the second with experts, at least two where there are as many."""
    sparse = stack.moe_layers
    last = sparse[min(2, len(sparse)) - 1] if sparse else 0
    layers = min(stack.layers, max(2, last + 1))
    own = stack.moe
    fewer = tuple(min(number, experts) for number in stack.experts_per_layer)
    return stack.replace(
        layers=layers,
        experts_per_layer=fewer[: sum(layer < layers for layer in sparse)],
        moe=None if own is None else _shrink_moe(own, experts=experts, dense=_hidden_width(config)),
    )


def _shrink_moe(moe: SparseLayer, *, experts: int, dense: int) -> SparseLayer:
    if not isinstance(moe, MoE):
        return moe
    own = moe.hidden
    narrow = None if own is None else min(own, max(8, HIDDEN * own // dense // 8 * 8))
    return moe.replace(experts=min(moe.experts, experts), hidden=narrow)


def _hidden_width(config: ModelConfig) -> int:
    return config.feed_forward.hidden


def _raise_eps(optimizer: Optimizer) -> Optimizer:
    match optimizer:
        case AdamW():
            return optimizer.replace(eps=EPS)
        case Muon():
            return optimizer.replace(adamw=optimizer.adamw.replace(eps=EPS))
    return optimizer


def _list_changes(before: Run, after: Run) -> Iterator[str]:
    old, new = (
        dict(line.split(" = ", 1) for line in run.to_flat_lines()) for run in (before, after)
    )
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}"
