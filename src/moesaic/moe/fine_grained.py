"""Fine-grained experts: more and smaller ones at the same size, some of them shared."""

from moesaic.core.errors import ConfigError
from moesaic.moe.around import NothingBeside
from moesaic.moe.bodies.shared import SharedExperts
from moesaic.moe.config import MoE
from moesaic.moe.select import TopK


def fine_grained(moe: MoE, *, hidden: int, parts: int, shared: int = 0) -> MoE:
    """Split each of N experts of width ``hidden`` into ``parts``, and make ``shared`` always on.

    DeepSeekMoE (2401.06066, sections 3.1 and 3.2): of parts * N experts of width hidden / parts a
    token uses parts * K, the shared ones among them, weighted with their softmax probabilities. So
    the experts' parameters, total and active, are what they were; the router grows.

    Raises ConfigError where the width does not divide or nothing would be left to route.
    """
    chosen = round(moe.select.experts_per_token(moe.experts))
    if hidden % parts:
        raise ConfigError([f"hidden={hidden}: expected a multiple of parts={parts}"])
    if not 0 <= shared < parts * chosen:
        left = f"fewer than the {parts * chosen} experts that a token uses"
        raise ConfigError([f"shared={shared}: expected 0 or more, and {left}"])
    return moe.replace(
        experts=parts * moe.experts - shared,
        hidden=hidden // parts,
        select=TopK(k=parts * chosen - shared, normalise="none"),
        beside=SharedExperts(number=shared) if shared else NothingBeside(),
    )
