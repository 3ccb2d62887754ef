"""Hash: an expert by the token's id alone.

Letters: T tokens, E experts.
"""

from moesaic.moe.gate import RouterContext
from moesaic.moe.routing import Routing
from moesaic.moe.select import Select
from moesaic.ops.random import hash_combine, hash_name


class Hash(Select):
    """The expert that a token's vocabulary id hashes to, with weight one (2106.04426).

    The hash is another in every layer and the same in every run. Nothing is learnt: use it with
    ``balance=()``, and compare learnt rules with it. The gate is there and counted, but not asked.
    The paper's balanced assignment, which knows how frequent each id is, is not here.
    """

    def __call__(self, router: RouterContext) -> Routing:
        tokens, experts = router.logits.shape
        key = hash_combine(router.context.token, router.context.salt ^ hash_name("hash"))
        expert = (key % experts)[:, None]
        weight = router.logits.new_ones(tokens, 1)
        return Routing.from_topk(weight, expert=expert, num_experts=experts)

    def experts_per_token(self, num_experts: int) -> float:
        return float(min(1, num_experts))
