"""AdamW's kernels agree bit for bit, and a tensor updated in parts equals one updated whole."""

from itertools import pairwise

import pytest
import torch
from torch.optim.adamw import adamw

from moesaic.ops.adamw import AdamWSettings, AdamWTensor, adamw_by_operations
from moesaic.ops.cpu.cpu_adamw import load_adamw

SETTINGS = AdamWSettings(lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
KERNELS = {"operations": adamw_by_operations, "compiled": load_adamw().kernel}
needs_compiler = pytest.mark.skipif(KERNELS["compiled"] is None, reason=load_adamw().reason)


def problem(*shape, step=1, grad_dtype=torch.float32, rounds=False, grad_scale=1.0):
    make = torch.Generator().manual_seed(sum(shape))
    param, grad, first, second = (torch.randn(shape, generator=make) for _ in range(4))
    return AdamWTensor(
        param,
        grad.to(grad_dtype),
        first,
        second.square(),
        SETTINGS.factors(step, grad_scale=grad_scale),
        torch.zeros(shape, dtype=torch.bfloat16) if rounds else None,
    )


def values(tensor):
    rounded = [] if tensor.rounded is None else [tensor.rounded]
    return [*state(tensor).values(), *rounded]


def state(tensor):
    return {"param": tensor.param, "exp_avg": tensor.exp_avg, "exp_avg_sq": tensor.exp_avg_sq}


def problems():
    """Tensors of every kind in one call: empty, odd, of several tasks, strided, to be rounded."""
    transposed = problem(7, 5)
    return [
        problem(0),
        problem(1, step=9),
        problem(40_001, grad_dtype=torch.bfloat16, rounds=True, grad_scale=0.3),
        problem(3, 33, rounds=True),
        transposed._replace(grad=transposed.grad.T.contiguous().T),
        problem(64, grad_dtype=torch.bfloat16, step=1000),
        problem(2_000)._replace(grad=torch.zeros(2_000)),
    ]


@needs_compiler
def test_the_compiled_kernel_gives_the_bits_of_the_separate_operations():
    compiled, reference = problems(), problems()
    KERNELS["compiled"](compiled)
    adamw_by_operations(reference)
    for one, other in zip(compiled, reference, strict=True):
        for a, b in zip(values(one), values(other), strict=True):
            assert torch.equal(a, b)


@needs_compiler
def test_numbers_that_are_not_finite_and_overflows_are_the_same():
    extreme = [float("nan"), float("inf"), -float("inf"), 1e30, 1e-30, -1e-42, 0.0]
    made = []
    for kernel in KERNELS.values():
        tensor = problem(7, rounds=True)._replace(grad=torch.tensor(extreme))
        kernel([tensor])
        made.append(values(tensor))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a.nan_to_num(nan=3.0), b.nan_to_num(nan=3.0))


@pytest.mark.parametrize("name", KERNELS)
def test_a_tensor_updated_in_parts_equals_one_updated_whole(name):
    kernel = KERNELS[name]
    if kernel is None:
        pytest.skip(load_adamw().reason)
    whole, parts = problem(1_003), problem(1_003)
    kernel([whole])
    cuts = (0, 1, 13, 500, 1_003)
    for start, end in pairwise(cuts):
        tensors = {n: t[start:end] for n, t in state(parts).items()}
        kernel([parts._replace(grad=parts.grad[start:end], **tensors)])
    for a, b in zip(values(whole), values(parts), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_torchs_adamw_differs_by_less_than_a_millionth_after_a_hundred_steps(fused):
    ours, theirs = (problem(999)._replace(exp_avg_sq=torch.ones(999)) for _ in range(2))
    step, make = torch.zeros(()), torch.Generator().manual_seed(1)
    for number in range(1, 101):
        grad = torch.randn(999, generator=make)
        adamw_by_operations([ours._replace(grad=grad, factors=SETTINGS.factors(number))])
        adamw(
            [theirs.param], [grad], [theirs.exp_avg], [theirs.exp_avg_sq], [], [step],
            fused=fused, foreach=not fused, amsgrad=False, maximize=False,
            beta1=0.9, beta2=0.98, lr=1e-2, weight_decay=0.1, eps=1e-8,
        )  # fmt: skip
    torch.testing.assert_close(ours.param, theirs.param, rtol=1e-6, atol=1e-6)
