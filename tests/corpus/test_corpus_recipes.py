import json
from typing import Any

import pytest
from schema_fits import fits

from moesaic.core.errors import ConfigError
from moesaic.corpus.corpus_recipes import NAMED_CORPORA, CorpusRecipe
from moesaic.corpus.text_rules import SoftwareStrings

SCHEMA = json.loads(CorpusRecipe.schema_json())
FILES = [{"path": "a/*.tsv", "source": "en", "target": "de", "origin": "ours", "licence": "MIT"}]
MINE: dict[str, Any] = {"name": "mine", "source": {"kind": "LocalFiles", "files": FILES}}


@pytest.mark.parametrize("recipe", list(NAMED_CORPORA.values()), ids=list(NAMED_CORPORA))
def test_the_schema_takes_every_named_corpus(recipe: CorpusRecipe) -> None:
    assert fits(recipe.to_dict(), SCHEMA)


def test_the_named_corpora_follow_the_rules_of_software_strings() -> None:
    assert {r.clean.text_rules for r in NAMED_CORPORA.values()} == {SoftwareStrings(tags="keep")}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"clean": {"text_rules": "SoftwareStrings", "disabled_rules": ["script"]}},
        {"split": {"domains": [{"name": "tales", "packages": ["a/*"]}], "test": 0.2}},
    ],
)
def test_the_schema_takes_what_the_parser_takes(more: dict[str, Any]) -> None:
    assert fits(MINE | more, SCHEMA)
    CorpusRecipe.from_dict(MINE | more)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "a/b"},
        {"name": ".."},
        {"name": ".hidden"},
        {"source": {"kind": "LocalFile"}},
        {"source": {"kind": "LocalFiles", "files": [{"paths": "x"}]}},
        {"source": {"kind": "LocalFiles", "files": [{"source": "en"}]}},
        {"clean": {"min_letters": 2}},
        {"clean": {"text_rules": "Nothing"}},
        {"split": {"test": "much"}},
        {"langs": ["de"]},
        {"min_pairs": 0},
    ],
)
def test_the_schema_refuses_what_the_parser_refuses(wrong: dict[str, Any]) -> None:
    assert not fits(MINE | wrong, SCHEMA)
    with pytest.raises(ConfigError):
        CorpusRecipe.from_dict(MINE | wrong)
