"""Router inputs with the tag's or the token's embedding equal their formulas."""

from dataclasses import replace

import pytest
import torch

from model.samples import BASE, batch_of, ids
from moesaic.data.batch import IGNORE_LABEL, Batch, InputRows
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.router_context import TokenContext
from moesaic.moe.router_gate import HiddenStateAndTag, HiddenStateAndToken, TagOnly, TokenOnly

TAGS = torch.tensor([7, 9, 7, 11])


def model_with(condition) -> Transformer:
    """A model with gate weights of a useful size."""
    model = Transformer(
        BASE.replace(moe=MoE(experts=4, select=TopK(k=1), router_input=condition))
    ).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter)
    return model


def tagged_batch() -> Batch:
    source, target = ids(4, [5, 7, 3, 6], width=7), ids(4, [6, 2, 4, 5], width=6)
    source.values[:, 0] = target.values[:, 0] = TAGS
    return batch_of(source, target, target.values.where(target.real, IGNORE_LABEL))


@pytest.mark.parametrize(
    "condition", [HiddenStateAndTag(), HiddenStateAndToken()], ids=["tag", "token"]
)
def test_logits_are_the_sum_of_two_products(condition):
    given, x, weight = torch.randn(6, 5), torch.randn(6, 5), torch.randn(3, 10)
    plain = TokenContext.unbatched(6)
    embedded_context = replace(plain, token_embedding=given, tag_embedding=given)
    read = condition.build()(x, context=embedded_context)
    torch.testing.assert_close(read @ weight.t(), x @ weight[:, :5].t() + given @ weight[:, 5:].t())
    with pytest.raises(TypeError, match="embedding"):
        condition.build()(x, context=plain)


def test_with_the_tag_only_all_tokens_of_a_row_have_one_expert():
    model = model_with(TagOnly())
    for record in model(tagged_batch()).records:
        taken = [record.routing.expert[record.row == row].unique().tolist() for row in range(4)]
        assert all(len(experts) == 1 for experts in taken)
        assert taken[0] == taken[2]  # the same tag
        rows = [record.logits[record.row == row][0] for row in range(4)]
        assert torch.equal(rows[0], rows[2])
        assert not torch.allclose(rows[0], rows[1])
        assert not torch.allclose(rows[0], rows[3])


def test_the_tag_embedding_changes_all_logits_of_its_row():
    model, batch = model_with(HiddenStateAndTag()), tagged_batch()
    before = model(batch).records[0]
    other = batch.source.values.clone()
    other[1, 0] = 13
    after = model(replace(batch, source=InputRows(other, batch.source.lengths))).records[0]
    changed, row = (before.logits != after.logits).any(1), before.row
    assert changed[row == 1].all()
    assert not changed[row != 1].any()


def test_with_the_token_only_an_id_has_one_expert():
    model, batch = model_with(TokenOnly()), tagged_batch()
    for record in model(batch).records:
        tokens, experts = record.context.token, record.routing.expert
        for token in tokens.unique():
            assert experts[tokens == token].unique().numel() == 1
        assert experts.unique().numel() > 1


def test_decoding_uses_the_tag_of_each_row():
    model, batch = model_with(TagOnly()), tagged_batch()
    memory = model.encode(batch.source)
    cache = model.init_cache(memory, rows=4)
    model.step(InputRows.full(batch.target.values[:, :1]), cache)
    order = torch.tensor([3, 1, 1])
    cache.reorder(order, order)
    model.step(InputRows.from_lists([[8], [12], [15]]), cache)
    assert cache.tag.tolist() == [11, 9, 9]
