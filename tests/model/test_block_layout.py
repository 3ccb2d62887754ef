"""Branches of a block run in sequence, or in parallel on one norm of its input."""

import pytest
import torch

from model.samples import BASE, NONE, batch_for
from moesaic.model.block_layout import ParallelResidual, SequentialResidual
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.model.transformer import Transformer
from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.moe.config import NoMoE
from moesaic.nn.embedding import EmbeddingConfig

DENSE = BASE.replace(moe=NoMoE())


def _seen(model, block):
    """Inputs and outputs of a block's parts in one pass."""
    found = {}

    def note(name):
        def hook(module, args, kwargs, output):
            del module
            found[name] = (args, kwargs, output)

        return hook

    for name, module in block.named_modules():
        if name:
            module.register_forward_hook(note(name), with_kwargs=True)
    block.register_forward_hook(note("block"), with_kwargs=True)
    model(batch_for(model.config))
    return found


def test_multipliers_equal_weights_that_are_multiplied_by_them():
    embedding = EmbeddingConfig(multiplier=2.0, logits_scaling=3.0)
    layout = SequentialResidual(residual_multiplier=0.5)
    scaled = Transformer(BASE.replace(embedding=embedding, block_layout=layout))
    plain = Transformer(BASE.replace(embedding=EmbeddingConfig(tied=False)))
    with torch.no_grad():
        for name, mine in plain.named_parameters():
            back = name.endswith(("inner.out.weight", "down.weight", "experts.down"))
            factor = {"embedding.weight": 2, "embedding.output": 1 / 3}.get(name, 0.5**back)
            given = name.replace("embedding.output", "embedding.weight")
            mine.copy_(scaled.get_parameter(given) * factor)
    batch = batch_for(BASE)
    got, wanted = (model.loss(model(batch)).total for model in (scaled, plain))
    torch.testing.assert_close(got, wanted)


def test_a_parallel_block_adds_all_branches_of_one_norm():
    model = Transformer(DENSE.replace(encoder=NONE, block_layout=ParallelResidual()))
    seen = _seen(model, model.decoder[0])
    (stream,), _, after = seen["block"]
    _, _, attention = seen["self_attention.inner"]
    _, _, feed = seen["feed_forward.inner"]
    torch.testing.assert_close(after.x, stream.x + attention + feed)
    read = model.decoder[0].input_norm(stream.x)
    for name in ("self_attention.inner", "feed_forward.inner"):
        torch.testing.assert_close(seen[name][0][0], read)


def test_a_sequential_block_feeds_each_branch_the_output_of_the_one_before():
    model = Transformer(DENSE.replace(encoder=NONE))
    block = model.decoder[0]
    seen = _seen(model, block)
    (stream,), _, after = seen["block"]
    between = stream.x + seen["self_attention.inner"][2]
    read = block.feed_forward.norm(between)
    torch.testing.assert_close(seen["feed_forward.inner"][0][0], read)
    torch.testing.assert_close(after.x, between + seen["feed_forward.inner"][2])


def test_cross_attention_reads_the_same_norm():
    model = Transformer(DENSE.replace(block_layout=ParallelResidual()))
    seen = _seen(model, model.decoder[0])
    (stream,), _, after = seen["block"]
    added = [seen[f"{b}.inner"][2] for b in ("self_attention", "cross_attention", "feed_forward")]
    torch.testing.assert_close(after.x, stream.x + sum(added))


@pytest.mark.parametrize("branches", [2, 3])
def test_norms_are_counted(branches):
    assert SequentialResidual().num_norms(branches) == branches
    assert ParallelResidual().num_norms(branches) == 1
    serial, parallel = (
        count_parameters(DENSE),
        count_parameters(DENSE.replace(block_layout=ParallelResidual())),
    )
    gone = DENSE.encoder.layers + 2 * DENSE.decoder.layers
    assert serial.total - parallel.total == gone * DENSE.dim


def test_attention_experts_multiply_the_cost_of_attention():
    plain = count_parameters(DENSE)
    many = count_parameters(DENSE.replace(mixers={"attention": MixtureOfAttention(experts=3)}))
    part = "encoder self-attention"
    routers = DENSE.encoder.layers * 3 * DENSE.dim
    assert many.parts[part] == 3 * plain.parts[part] + routers
    shared = MixtureOfAttention(experts=3, key_values="shared")
    few = count_parameters(DENSE.replace(mixers={"attention": shared}))
    assert plain.parts[part] < few.parts[part] < many.parts[part]
