import pytest

from moesaic.core.errors import CheckpointError
from moesaic.exchange.export_model import SHAPED_RECIPES, find_family
from moesaic.exchange.gguf_families import gguf_architecture
from moesaic.exchange.same_model import resolved
from moesaic.recipes.lookup import RECIPES


@pytest.mark.parametrize(
    ("name", "family"),
    [("mixtral-shaped", "mixtral"), ("qwen3-shaped", "qwen3_moe"), ("nllb-shaped", "nllb-moe")],
)
def test_a_shaped_recipe_is_a_model_that_others_hold(name, family):
    model = RECIPES(name).model
    assert find_family(model).model_type == family
    if not model.encoder.layers:
        gguf_architecture(find_family(model)).require_computable(resolved(model))


@pytest.mark.parametrize(("name", "side"), [("demo", "encoder"), ("language-model", "decoder")])
def test_a_recipe_that_nobody_holds_is_refused_with_one_that_can_be_exported(name, side):
    with pytest.raises(CheckpointError, match=f"nearest is .* The recipe {SHAPED_RECIPES[side]}"):
        find_family(RECIPES(name).model)
    assert find_family(RECIPES(SHAPED_RECIPES[side]).model)
