"""Same model: one config for all that compute the same, so that two can be compared.

What acts in training alone (losses, noise, dropout, initial values) is as in the other config.
"""

from moesaic.model.config import InitConfig, ModelConfig, Stack
from moesaic.model.head import LanguageModelHead
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_capacity import Capacity, Dropless
from moesaic.moe.expert_selection import Select, SwitchTop1, Top2, TopK
from moesaic.moe.router_noise import NoRouterNoise
from moesaic.nn.positional_encoding import Rotary


def canonical(model: ModelConfig) -> ModelConfig:
    """Return one config for all models that compute the same in evaluation."""
    if isinstance(model.position, Rotary) and not model.mixers:  # weights may be of either
        model = model.replace(position=model.position.replace(pairing="halves"))
    head = LanguageModelHead() if isinstance(model.head, LanguageModelHead) else model.head
    model = resolved(model).replace(head=head, dropout=0.0, init=InitConfig())
    if not isinstance(model.moe, MoE):
        return model
    moe = model.moe
    if isinstance(moe.limit, Capacity) and moe.limit.eval_factor is None:
        return canonical(model.replace(moe=moe.replace(limit=Dropless())))
    biased = any(isinstance(term, BiasUpdate) for term in moe.balance)
    moe = moe.replace(
        balance=(BiasUpdate(),) if biased else (),
        noise=NoRouterNoise(),
    )
    return model.replace(moe=moe)


def resolved(model: ModelConfig) -> ModelConfig:
    """Return the config of the same model with every width, and a select of few kinds."""
    heads = model.attention
    names = ("query", "key", "value", "output")
    biased = heads.has_bias(*names, default=model.bias)
    model = model.replace(
        attention=heads.replace(
            kv_heads=heads.num_kv_heads(),
            head_dim=heads.head_width(model.dim),
            bias=tuple(name for name, has in zip(names, biased, strict=True) if has),
        ),
        **{side: _canonical_stack(model, model.stack_of(side)) for side in ("encoder", "decoder")},
    )
    stacks = (model.encoder, model.decoder)
    if not any(stack.moe_layers for stack in stacks):
        return model.replace(moe=NoMoE())
    if not isinstance(model.moe, MoE):
        return model
    hidden, own = model.moe.hidden or model.feed_forward.hidden, model.feed_forward
    dense = any(model.is_dense_layer(s, layer=i) for s in stacks for i in range(s.layers))
    dropless = isinstance(model.moe.limit, Dropless)
    select = _canonical_select(model.moe.select, dropless=dropless)
    return model.replace(
        moe=model.moe.replace(hidden=hidden, select=select),
        feed_forward=own if dense else own.replace(hidden=hidden),
    )


def _canonical_stack(model: ModelConfig, stack: Stack) -> Stack:
    if not stack.layers:
        return Stack(layers=0)
    sparse = () if isinstance(model.moe_of_stack(stack), NoMoE) else stack.moe_layers
    return stack.replace(moe_every=1, first_dense_layers=0, sparse_layers=sparse)


def _canonical_select(select: Select, *, dropless: bool) -> Select:
    """Return a rule that selects and weighs the same experts in evaluation."""
    if isinstance(select, SwitchTop1):
        return TopK(k=1, normalise="none")
    if isinstance(select, Top2):
        select = TopK(k=2, normalise=select.normalise, scale=select.scale)
    if isinstance(select, TopK) and dropless and select.normalise == "after":
        return select.replace(normalise="before")
    return select
