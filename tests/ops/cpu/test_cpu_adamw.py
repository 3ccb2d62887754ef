"""The compiled AdamW is used where it is correct, and replaced by the reference where it is not."""

import pytest
import torch

from moesaic.ops import kernel_selection
from moesaic.ops.adamw import adamw_by_operations
from moesaic.ops.cpu.cpu_adamw import AdamWStatus, check_adamw, load_adamw
from moesaic.ops.kernel_selection import select_adamw, selected_kernels
from moesaic.optim.optimizer import AdamW


def test_what_is_no_library_is_not_used(tmp_path):
    path = tmp_path / "adamw.so"
    path.write_bytes(b"not an object file")
    assert "cannot be loaded" in check_adamw(path).reason


def test_without_a_compiler_the_separate_operations_are_used(monkeypatch):
    monkeypatch.setattr(kernel_selection, "load_adamw", lambda: AdamWStatus(None, "no C compiler"))
    assert select_adamw() is adamw_by_operations
    assert [k.reason for k in selected_kernels("cpu") if k.operation == "AdamW"] == [
        "no C compiler"
    ]


@pytest.mark.skipif(load_adamw().kernel is None, reason=load_adamw().reason)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_with_the_compiled_kernel_equals_one_without(monkeypatch, dtype):
    trained = []
    for kernel in (load_adamw().kernel, None):
        monkeypatch.setattr(kernel_selection, "load_adamw", lambda k=kernel: AdamWStatus(k, ""))
        make = torch.Generator().manual_seed(0)
        named = {
            n: torch.nn.Parameter(torch.randn(9, 7, generator=make).to(dtype)) for n in ("a", "b")
        }
        optimizer = AdamW(lr=0.01).build(named.items(), kinds=dict.fromkeys(named, "matrix"))
        for _ in range(3):
            for parameter in named.values():
                parameter.grad = torch.randn(9, 7, generator=make).to(dtype)
            optimizer.step()
        trained.append(list(named.values()))
    for a, b in zip(*trained, strict=True):
        assert torch.equal(a, b)
