"""Fine-grained experts: more and smaller ones at the same size, some of them shared."""

from moesaic.core.errors import ConfigError
from moesaic.moe.around import NoSharedExperts
from moesaic.moe.bodies.shared import SharedExperts
from moesaic.moe.config import MoE
from moesaic.moe.select import TopK


def fine_grained(moe: MoE, *, hidden: int, splits: int, shared: int = 0) -> MoE:
    """Split each of N experts of width ``hidden`` into ``parts``, and make ``shared`` always on.

    DeepSeekMoE (2401.06066, sections 3.1 and 3.2): of parts * N experts of width hidden / parts a
    token uses parts * K, the shared ones among them, weighted with their softmax probabilities. So
    the experts' parameters, total and active, are what they were; the router grows.

    Raises ConfigError where the width does not divide or nothing would be left to route.
    """
    chosen = round(moe.select.experts_per_token(moe.experts))
    if hidden % splits:
        raise ConfigError([f"hidden={hidden}: expected a multiple of parts={splits}"])
    if not 0 <= shared < splits * chosen:
        left = f"fewer than the {splits * chosen} experts that a token uses"
        raise ConfigError([f"shared={shared}: expected 0 or more, and {left}"])
    return moe.replace(
        experts=splits * moe.experts - shared,
        hidden=hidden // splits,
        select=TopK(k=splits * chosen - shared, normalise="none"),
        beside=SharedExperts(number=shared) if shared else NoSharedExperts(),
    )
