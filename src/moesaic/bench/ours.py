"""Contenders that need nothing but torch: the dense layer, ours, and ours by other paths."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from moesaic.bench.problem import Absent, Contender, Problem
from moesaic.bench.shapes import zipf_bias
from moesaic.core.shapes import Tensor
from moesaic.moe.dispatch import LocalDispatcher
from moesaic.moe.experts import GroupedExperts, ExpertShape
from moesaic.moe.gate import RouterContext
from moesaic.moe.select import TopK
from moesaic.nn.activation import SwiGLU
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.ops.choose import ENGINES, pick_mixer
from moesaic.ops.mixture import Composed, Edges, Mixer


def dense(problem: Problem) -> Contender:
    """One SwiGLU layer over as many rows as go through experts: the work without the choice."""
    shape = problem.shape
    repeated = problem.x.repeat_interleave(shape.k, 0)
    x, up, down = (problem.leaf(t) for t in (repeated, problem.up[0].t(), problem.down[0].t()))

    def forward() -> Tensor:
        gate, value = F.linear(x, up).chunk(2, -1)
        return F.linear(F.silu(gate) * value, down)

    return Contender("dense", forward, x, (up, down), problem.pull.repeat_interleave(shape.k, 0))


def dense_compiled(problem: Problem) -> Contender | Absent:
    """The same through torch.compile."""
    eager = dense(problem)
    torch.compiler.reset()
    compiled: Callable[[], Tensor] = torch.compile(eager.forward)
    made = Contender("dense-compiled", compiled, eager.x, eager.weights, eager.pull)
    try:
        made.run()
    except Exception as error:  # whatever is missing for torch.compile on this machine
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return Absent("dense-compiled", f"torch.compile does not run here: {first[:100]}")
    return made


def moesaic(problem: Problem, *, name: str = "moesaic") -> Contender:
    """The layer as it is used: router, and the mixer that this machine takes."""
    return _layer(name, problem, mixer=pick_mixer(problem.x, activation=SwiGLU()))


def moesaic_bfloat16(problem: Problem) -> Contender:
    """The same with weights of half the size."""
    half = replace(problem, up=problem.up.bfloat16(), down=problem.down.bfloat16())
    return moesaic(half, name="moesaic-bfloat16")


def moesaic_zipf(problem: Problem) -> Contender:
    """The same with the load of the experts proportional to 1 / rank."""
    logits = problem.x.float() @ problem.gate.float().t()
    gate = problem.gate.clone()
    gate[:, 0] += zipf_bias(logits, k=problem.shape.k)  # the first feature is one
    return moesaic(replace(problem, gate=gate), name="moesaic-zipf")


def composed(engine: str) -> Callable[[Problem], Contender]:
    """The path without a compiler, with the engine of a name."""

    def make(problem: Problem) -> Contender:
        return _layer(f"composed-{engine}", problem, mixer=Composed(ENGINES[engine]))

    return make


def read_weights(problem: Problem) -> Contender:
    """Only read the experts that are chosen, once: what decoding cannot go below."""
    chosen = (problem.x @ problem.gate.t()).topk(problem.shape.k).indices.unique().tolist()
    up, down = problem.up, problem.down

    def forward() -> Tensor:
        sums = [up[e].sum() + down[e].sum() for e in chosen]
        return torch.stack(sums)

    return Contender("read-weights", forward, problem.x.detach(), (), problem.pull)


class _With(GroupedExperts):
    """Experts that go by a mixer of our choice."""

    def __init__(self, problem: Problem, *, mixer: Mixer) -> None:
        shape = problem.shape
        feed_forward = FeedForwardConfig(hidden=shape.hidden, activation=SwiGLU())
        with torch.device("meta"):
            super().__init__(ExpertShape(shape.experts, shape.dim, feed_forward, bias=False))
        self.up = torch.nn.Parameter(problem.up.clone(), requires_grad=problem.trains)
        self.down = torch.nn.Parameter(problem.down.clone(), requires_grad=problem.trains)
        self.mixer = mixer

    def mix(self, x: Tensor, *, edges: Edges) -> Tensor:
        return self.mixer(x, edges=edges, banks=self.weights, activation=self.activation)


def _layer(name: str, problem: Problem, *, mixer: Mixer) -> Contender:
    x, gate = problem.leaf(problem.x), problem.leaf(problem.gate)
    experts, select, dispatcher = (
        _With(problem, mixer=mixer),
        TopK(k=problem.shape.k),
        LocalDispatcher(),
    )

    def forward() -> Tensor:
        logits = F.linear(x, gate).float()
        routing = select(RouterContext.from_logits(logits, training=problem.trains))
        return dispatcher.run_experts(x, routing=routing, experts=experts)

    return Contender(name, forward, x, (gate, experts.up, experts.down), problem.pull)
