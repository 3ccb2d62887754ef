"""Law: forward, backward and update of a dropless model need no value that is on the device.

They run on torch's ``meta`` device, whose tensors have shapes and no values: to read one is an
error, as is a copy that the host waits for. The copies and sums of all ranks are in
``test_a_dropless_step_waits_for_no_device.py``.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.overrides import TorchFunctionMode

from head_cases import HEADS, LABELS, head_batch
from mixer_cases import hybrid
from moe.variants import BALANCES, LAYER_PARTS, SELECTS, balanced, mixture
from moesaic.core.shapes import Tensor
from moesaic.data.batch import Batch
from moesaic.distributed.world import SingleProcess
from moesaic.model.config import ModelConfig
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.ops import kernel_selection
from moesaic.ops.grouped_gemm import RowGroups
from moesaic.optim import update_rules
from moesaic.optim.optimizer import Muon
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.testing.tiny_models import TinyStream, tiny_model_config, tiny_run
from moesaic.train.run_training import seeded_trainer

DEVICE = torch.device("meta")
VARIABLE = ("top-p", "top-p-capped", "threshold", "expert-choice")  # edges, of a number to be read
MODEL = tiny_model_config(
    moe=MoE(experts=4, select=TopK(k=2), balance=(SwitchBalance(), RouterZLoss()))
)


class ProductsWithoutValues:
    """A grouped GEMM of the shapes alone; that of a GPU reads its row counts on the device."""

    name = "no values"

    def matmul(self, rows: Tensor, weight: Tensor, *, groups: RowGroups) -> Tensor:
        del groups
        return rows.new_empty(rows.shape[0], weight.shape[-1])

    def weight_gradient(self, left: Tensor, right: Tensor, *, groups: RowGroups) -> Tensor:
        return left.new_empty(groups.offsets.numel(), left.shape[-1], right.shape[-1])


class CopiesThatWait(TorchFunctionMode):
    """Raises for a copy to the device that the host waits for: all but ``non_blocking`` ones."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out, named = func(*args, **(kwargs or {})), kwargs or {}
        name = getattr(func, "__name__", "")
        from_host = name in ("tensor", "as_tensor") or (
            name in ("to", "copy_", "new_tensor") and _on_host(args[1 if name == "copy_" else 0])
        )
        waits = from_host and isinstance(out, torch.Tensor) and out.device == DEVICE
        assert not (waits and not named.get("non_blocking")), f"{name} of {tuple(out.shape)} waits"
        return out


def _on_host(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"


class StreamOfHead(TinyStream):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.labels, self._name = LABELS, name

    def full_batch(self, number: int) -> Batch:
        return head_batch(self._name, seed=number)


def step_without_values(
    config: ModelConfig, *, stream: TinyStream | None = None, **changes: Any
) -> None:
    """Compute the gradients of two micro-batches, and update by them."""
    data = stream or TinyStream()
    run = tiny_run(model=config, optimizer=Muon(), gradient_accumulation_steps=2, **changes)
    with (
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),  # knows no such device
        patch.object(torch, "is_autocast_enabled", lambda *_: False),
        patch.dict(kernel_selection.GROUPED_GEMMS, sequential=ProductsWithoutValues()),
        patch.object(update_rules, "FUSED_DEVICES", ("meta",)),
    ):
        trainer = seeded_trainer(run, make_loader=lambda _: data, world=SingleProcess(DEVICE))
        with CopiesThatWait():
            batches = [next(data) for _ in range(2)]
            trainer.objective.forward_backward(trainer.parallel_model, batches=batches)
            trainer.optimizer.step()


def _with(moe: MoE) -> ModelConfig:
    return MODEL.replace(encoder=MODEL.encoder.replace(moe=moe))


MODELS = {
    "encoder-decoder": MODEL,
    "mixers": hybrid(MODEL),
    **{name: _with(mixture(name, "dropless")) for name in SELECTS},
    **{name: _with(balanced(name)) for name in BALANCES},
    **{name: _with(MoE(experts=4, **parts)) for name, parts in LAYER_PARTS.items()},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_reads_no_value_of_the_device(name: str) -> None:
    if name not in VARIABLE:
        step_without_values(MODELS[name])
        return
    with pytest.raises((RuntimeError, NotImplementedError), match=r"nonzero|meta"):
        step_without_values(MODELS[name])


@pytest.mark.parametrize("name", HEADS)
def test_a_head_selects_what_it_predicts_on_the_host(name: str) -> None:
    step_without_values(HEADS[name], stream=StreamOfHead(name))


def test_an_adapter_reads_no_value_of_the_device() -> None:
    step_without_values(MODEL, trainable=LoRA(rank=2))
