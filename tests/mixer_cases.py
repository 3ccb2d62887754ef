"""The sequence mixers over which the laws run: one line for each.

``VARIANTS`` of ``model/samples.py`` has a model of each, and one of all together; the laws about
padding, decoding, counts and estimates run over it. The laws about plans and resuming run over
``hybrid``.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch

from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.transformer import Transformer
from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.nn.attention import Attention
from moesaic.nn.attention_parts import (
    Chunks,
    LearnedSinks,
    LogPositionTemperature,
    SlidingWindow,
)
from moesaic.nn.gated_linear_attention import GatedLinearAttention
from moesaic.nn.latent_attention import LatentAttention
from moesaic.nn.mamba2 import Mamba2
from moesaic.nn.norm import RMSNorm
from moesaic.nn.positional_encoding import Rotary
from moesaic.nn.qk_norm import L2QKNorm, PerHeadQKNorm
from moesaic.nn.rotary_scaling import LinearScaling, Llama3Scaling, NTKScaling, YaRN
from moesaic.nn.sequence_mixer import SequenceMixer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "your-own-mixer.md"


def _mixer_of_the_guide() -> SequenceMixer:
    """Return the mixer that the guide defines, under another name: the page may define it too."""
    text = PAGE.read_text(encoding="utf-8").split("```python file=my_mixer.py\n")[1].split("```")[0]
    module = ModuleType("mixer_of_the_guide")
    sys.modules[module.__name__] = module
    exec(
        text.replace("TokenShift", "GuideTokenShift").replace('"token_shift', '"guide_token_shift'),
        module.__dict__,
    )
    return module.GuideTokenShift()


MSCALED = Rotary(scaling=YaRN(factor=4, original_length=8, mscale=1.0, mscale_all_dim=0.7))
MIXERS: dict[str, SequenceMixer] = {
    "own_heads": Attention(
        heads=2, kv_heads=2, head_dim=6, position=Rotary(scaling=LinearScaling(factor=3))
    ),
    "attention_experts": MixtureOfAttention(experts=2),
    "window": Attention(
        window=SlidingWindow(size=3),
        sinks=LearnedSinks(),
        qk_norm=PerHeadQKNorm(),
        bias=("query", "value"),
        scale=0.4,
        position=Rotary(
            pairing="halves", fraction=0.5, scaling=Llama3Scaling(factor=4, original_length=8)
        ),
    ),
    "chunks": Attention(
        window=Chunks(size=3),
        qk_norm=L2QKNorm(),
        clip=2.0,
        softcap=3.0,
        # with 0.7, initial weights that differ by 1e-7 move gradients by 1.5e-4 in one process
        temperature=LogPositionTemperature(weight=0.3, interval=2),
        position=Rotary(scaling=NTKScaling(factor=3)),
    ),
    "latent": LatentAttention(
        kv_rank=6, query_rank=5, nope_dim=4, rope_dim=2, value_dim=3, position=MSCALED
    ),
    # the norm of a head divides by the size of its output, which is near zero where q . k is: with
    # a small eps it amplifies the rounding of q . k beyond the tolerances between plans
    "gated_linear_attention": GatedLinearAttention(heads=4, gate_rank=4, norm=RMSNorm(eps=0.01)),
    "mamba2": Mamba2(head_dim=8, state=6, groups=4),
    "of_the_guide": _mixer_of_the_guide(),
}


def alone(base: ModelConfig, name: str) -> ModelConfig:
    """Return a model with one mixer in every decoder block, and in the encoder if it fits there."""
    mixer, sides = MIXERS[name], {"decoder": base.decoder.replace(pattern=name)}
    if mixer.problems(base.mixer_shape("encoder")) is None:
        sides["encoder"] = base.encoder.replace(pattern=name)
    return base.replace(mixers={name: mixer}, **sides)


def in_sequence(base: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """Return a model whose decoder blocks have all of these mixers, one after the other."""
    mixers = {name: MIXERS[name] for name in names}
    return base.replace(mixers=mixers, decoder=base.decoder.replace(pattern=" > ".join(mixers)))


def hybrid(base: ModelConfig, names: Iterable[str] = MIXERS) -> ModelConfig:
    """Return a model whose decoder has mixers in parallel, in sequence, and no feed-forward.

    All are on one input, since rounding grows with each mixer that follows another.
    """
    names = list(names)
    first, last = names[0], names[-1]
    blocks = [" | ".join(names), f"{first} > {last}", f"{last}-"]
    decoder = Stack(layers=3, moe_every=1, pattern=", ".join(blocks))
    return base.replace(mixers={name: MIXERS[name] for name in names}, decoder=decoder)


def names_allowed_by(base: ModelConfig, plan: ParallelPlan) -> list[str]:
    """Return the mixers that a plan does not refuse."""
    return [name for name in MIXERS if _is_allowed(alone(base, name), plan)]


def _is_allowed(config: ModelConfig, plan: ParallelPlan) -> bool:
    with torch.device("meta"):
        model = Transformer(config)
    try:
        check_parallel(model, parallel=ParallelConfig(plan=plan), plan=plan)
    except ConfigError:
        return False
    return True
