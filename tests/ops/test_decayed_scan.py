"""A chunked scan gives what the recurrence gives token by token, gradients included."""

import pytest
import torch

from moesaic.core.shapes import Tensor
from moesaic.ops.decayed_scan import ScanInputs, decayed_scan, state_change
from ops.references import reference_decayed_scan

ROWS, KEY, VALUE = 2, 4, 3
HEADS = {  # key heads, value heads, decay channels
    "per channel": (2, 2, KEY),
    "per channel in groups": (1, 2, KEY),
    "per head": (2, 2, 1),
    "per head in groups": (2, 4, 1),
}
DECAYS = {"almost none": 1e-4, "usual": 1.0, "strong": 60.0, "beyond float32's exponents": 1e4}


def _inputs(heads: str, *, length: int, decay: float = 1.0) -> tuple[ScanInputs, Tensor]:
    """Return inputs with random decays, of which some are zero, and an initial state."""
    groups, values, channels = HEADS[heads]
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    log_decay = -decay * torch.rand(
        ROWS, length, values, channels, generator=draw, dtype=torch.float64
    )
    log_decay *= torch.rand(log_decay.shape, generator=draw) < 0.7
    inputs = ScanInputs(
        normal(ROWS, length, groups, KEY),
        normal(ROWS, length, groups, KEY),
        normal(ROWS, length, values, VALUE),
        log_decay,
    )
    return inputs, normal(ROWS, values, KEY, VALUE)


def _as_float32(inputs: ScanInputs) -> ScanInputs:
    return ScanInputs(*(x.float() for x in inputs))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("heads", HEADS)
def test_chunks_of_any_length_equal_the_recurrence(heads: str, decay: str) -> None:
    for length in (1, 2, 3, 8, 9, 37):
        inputs, state = _inputs(heads, length=length, decay=DECAYS[decay])
        out, last = reference_decayed_scan(inputs, state=state, scale=0.5)
        found = decayed_scan(_as_float32(inputs), state=state.float(), scale=0.5, chunk=8)
        torch.testing.assert_close(found.out.double(), out, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found.state.double(), last, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
def test_gradients_are_those_of_the_recurrence(heads: str) -> None:
    for length in (1, 11):
        inputs, state = _inputs(heads, length=length)
        leaves = [x.requires_grad_() for x in (*inputs, state)]
        expected = reference_decayed_scan(inputs, state=state, scale=0.5)
        grads = [torch.randn_like(x) for x in expected]
        wanted = torch.autograd.grad(expected, leaves, grads)
        found = decayed_scan(inputs, state=state, scale=0.5, chunk=4)
        for one, other in zip(torch.autograd.grad(found, leaves, grads), wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("heads", ["per channel", "per head in groups"])
def test_gradients_equal_finite_differences(heads: str) -> None:
    inputs, state = _inputs(heads, length=3)
    leaves = [x.requires_grad_() for x in (*inputs, state)]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return decayed_scan(ScanInputs(*tensors[:4]), state=tensors[4], chunk=2)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("heads", HEADS)
def test_gradients_of_strong_decays_are_finite(heads: str) -> None:
    inputs, _ = _inputs(heads, length=70, decay=1e4)
    leaves = [x.requires_grad_() for x in _as_float32(inputs)]
    decayed_scan(ScanInputs(*leaves)).out.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("heads", HEADS)
def test_a_row_continues_from_its_state(heads: str) -> None:
    inputs, state = _inputs(heads, length=21)
    whole = decayed_scan(inputs, state=state, chunk=8)
    for cut in (1, 5, 16, 20):
        first = decayed_scan(ScanInputs(*(x[:, :cut] for x in inputs)), state=state, chunk=8)
        rest = ScanInputs(*(x[:, cut:] for x in inputs))
        second = decayed_scan(rest, state=first.state, chunk=8)
        torch.testing.assert_close(torch.cat([first.out, second.out], 1), whole.out)
        torch.testing.assert_close(second.state, whole.state)


@pytest.mark.parametrize("heads", HEADS)
def test_a_state_change_has_the_effect_of_its_tokens(heads: str) -> None:
    inputs, state = _inputs(heads, length=21)
    change = state_change(inputs, chunk=8)
    found = change.log_decay.exp()[..., None] * state + change.added
    torch.testing.assert_close(found, decayed_scan(inputs, state=state).state)


def test_bfloat16_rows_have_a_float32_state() -> None:
    inputs, _ = _inputs("per channel", length=9)
    rounded = ScanInputs(*(x.bfloat16() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decayed_scan(rounded)
    expected = decayed_scan(_as_float32(ScanInputs(*(x.float() for x in rounded))))
    assert found.out.dtype == torch.bfloat16
    torch.testing.assert_close(found.state, expected.state)


def test_only_the_inputs_are_saved_for_backward() -> None:
    inputs, state = _inputs("per head in groups", length=16)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.untyped_storage().data_ptr()) or x, lambda x: x
    ):
        decayed_scan(ScanInputs(*leaves[:4]), state=leaves[4])
    assert set(saved) == {x.untyped_storage().data_ptr() for x in leaves}
