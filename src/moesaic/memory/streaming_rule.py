"""Streaming rule: from how many tokens per expert on the fetch of expert weights costs no time.

While an expert multiplies M tokens by n weights, in ``2 M n / F`` seconds, the next one's weights
arrive in ``b n / B``: the fetch is hidden if ``M >= b F / (2 B)``, whatever the width of the model
(the rule of NVIDIA/Megatron-LM issue 6491). A backward pass multiplies twice as much, and gradients
leave while weights arrive.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamingRates:
    """Rates of a machine: FLOPs per second of expert products, bytes per second of both links.

    ``fetch`` is towards the device, ``write`` away from it. Measure them under contention: a copy
    beside a product is slower than alone.
    """

    flops: float
    fetch: float
    write: float


def tokens_per_expert(tokens: float, *, experts: int, experts_per_token: float) -> float:
    """Return M: the mean number of tokens that an expert computes of a micro-batch.

    ``tokens`` are those that reach the experts of one rank group: micro-batch times sequence
    length, summed over the data ranks that share the ``experts``.
    """
    return tokens * experts_per_token / experts


def hidden_forward_tokens(rates: StreamingRates, *, weight_bytes: float) -> float:
    """Return the M from which on fetching weights of so many bytes each is hidden in forward."""
    return weight_bytes * rates.flops / (2 * rates.fetch)


def hidden_backward_tokens(
    rates: StreamingRates, *, weight_bytes: float, gradient_bytes: float
) -> float:
    """Return the M from which on both transfers of backward are hidden.

    ``gradient_bytes`` are those of each gradient that leaves the device; 0 if gradients stay.
    """
    slowest = max(weight_bytes / rates.fetch, gradient_bytes / rates.write)
    return rates.flops / 4 * slowest
