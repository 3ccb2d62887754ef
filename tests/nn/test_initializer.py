"""No module of the package has uninitialised memory for weights."""

import ast
import importlib
import pkgutil
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import moesaic
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.experts import Expert, ExpertShape, GroupedExperts
from moesaic.moe.low_rank_experts import LowRankExperts
from moesaic.moe.moe_module import MoEModule
from moesaic.moe.product_key_memory import ProductKeyMemory
from moesaic.moe.router_gate import CrossLayerRouting, LayerIndex, RouterShape
from moesaic.moe.shared_experts import SharedExpertBranch
from moesaic.moe.soft_moe import SoftMoE
from moesaic.moe.sparse_experts import ChosenExperts
from moesaic.nn.adapter import LowRankLinear
from moesaic.nn.embedding import Embedding, EmbeddingConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.initializer import normal_parameter, parameters_on_meta
from moesaic.nn.parameter_spec import FeedForwardShape
from moesaic.nn.recurrence_backend import ConvolutionWeights
from moesaic.nn.sparse_adapter import SparseLinear, SparseValues
from moesaic.testing.tiny_models import tiny_model_config

SRC = Path(moesaic.__file__).parent
SHAPE = FeedForwardShape(8, FeedForwardConfig(hidden=12), bias=True)


@contextmanager
def uninitialised_memory_is_nan():
    """torch fills new memory with NaN, so that memory nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gates():
    for rule, at in product(CrossLayerRouting.__subclasses__(), (0, 1)):
        shape = RouterShape(8, 4, LayerIndex("x", index=at, count=2))
        yield rule().build_gate(shape)
        yield rule().build_shared(shape) or nn.Identity()


def modules():
    """Modules made outside a model: every member of the families that build one."""
    yield MoEModule(8, 12, 4)
    yield ProductKeyMemory(keys_per_side=3).build(SHAPE)
    yield SoftMoE(experts=4).build(SHAPE)
    for expert in Expert.__subclasses__():
        yield expert().build(ExpertShape(4, 8, SHAPE.feed_forward, bias=True))
    for branch in SharedExpertBranch.__subclasses__():
        yield branch().build(SHAPE) or nn.Identity()
    grouped = GroupedExperts(ExpertShape(4, 8, SHAPE.feed_forward, bias=True))
    yield ChosenExperts(grouped, matrices=("up", "down"), chosen=(0, 2))
    yield LowRankExperts(grouped, matrices=("up", "down"), rank=2, scale=2.0)
    yield LowRankLinear(nn.Linear(8, 6), rank=2, scale=2.0)
    yield SparseLinear(nn.Linear(8, 6), density=0.5, path="linear")
    yield from gates()
    yield ConvolutionWeights(4, width=3)
    yield Embedding(EmbeddingConfig(tied=False), vocab_size=10, dim=8)


def not_finite(module):
    named = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in named if not bool(tensor.isfinite().all())]


def test_a_module_made_outside_a_model_has_values():
    with uninitialised_memory_is_nan():
        assert not bool(torch.empty(3).isfinite().any())
        bad = {type(m).__name__: names for m in modules() if (names := not_finite(m))}
    assert bad == {}


@pytest.mark.parametrize("moe", [MoE(experts=4), ProductKeyMemory(), SoftMoE(experts=2)])
def test_a_model_draws_what_its_modules_left_without_values(moe):
    with uninitialised_memory_is_nan():
        model = Transformer(tiny_model_config(moe=moe))
    assert not_finite(model) == []


def test_parameters_on_meta_draw_nothing_from_the_generator():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with parameters_on_meta():
        assert normal_parameter(4, 5, std=1.0).is_meta
        assert nn.Linear(3, 4).weight.is_meta
        assert torch.zeros(3).tolist() == [0.0] * 3  # a buffer's values
    assert torch.equal(torch.rand(2), expected)
    assert normal_parameter(4000, std=0.5).std().item() == pytest.approx(0.5, rel=0.1)


def test_no_module_class_makes_a_parameter_without_values():
    found = []
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Parameter"):
                text = ast.unparse(node)
                if "empty" in text and "device='meta'" not in text:
                    found.append(path.relative_to(SRC).as_posix())
    # normal_parameter, which then draws it, and drop_values
    assert set(found) == {"nn/initializer.py"}


def test_every_module_class_with_parameters_was_made():
    """A new module class must be reached by ``modules`` or by a model, or have no parameters."""
    for info in pkgutil.walk_packages([str(SRC / "moe")], "moesaic.moe."):
        importlib.import_module(info.name)
    made = {type(inner) for module in modules() for inner in module.modules()}
    made |= {type(inner) for inner in Transformer(tiny_model_config()).modules()}
    made.add(SparseValues)  # the base of sparse adapters, which is not made itself
    direct = set()
    stack = [nn.Module]
    while stack:
        for kind in stack.pop().__subclasses__():
            stack.append(kind)
            if not kind.__module__.startswith(("moesaic.moe", "moesaic.nn")):
                continue
            source = SRC / Path(*kind.__module__.split(".")[1:]).with_suffix(".py")
            if kind.__dict__.get("__init__") and "normal_parameter" in _init(source, kind):
                direct.add(kind)
    assert {kind.__name__ for kind in direct - made} == set()
    assert len(direct) >= 7


def _init(source, kind):
    tree = ast.parse(source.read_text(encoding="utf-8"))
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == kind.__name__]
    return ast.unparse(classes[0]) if classes else ""
