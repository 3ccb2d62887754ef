import copy
import json
import pickle
import re
from abc import abstractmethod
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from moesaic.core.config import Choice, Config
from moesaic.core.errors import ConfigError, UserError


class Norm(Choice):
    """Family of norms."""


class RMSNorm(Norm):
    """Root mean square."""

    eps: float = 1e-6
    """Added below the root."""


class LayerNorm(Norm):
    eps: float = 1e-5
    bias: bool = False


class Select(Choice):
    """Family of selections."""


class TopK(Select):
    k: Annotated[int, Field(ge=1)] = 1


class Both(Select):
    """Two selections; a family may contain itself."""

    first: Select = TopK()
    second: TopK = TopK(k=2)


class Layer(Config):
    """One layer."""

    norm: Norm = LayerNorm(bias=True)
    width: int = 4


class Mode(Enum):
    FAST = "fast"
    EXACT = "exact"


NORMS = "expected one of RMSNorm, LayerNorm, e.g. {kind: RMSNorm}"


class Model(Config):
    """A model."""

    dim: Annotated[int, Field(gt=0, le=4096)]
    """Width of the model."""
    rate: float = 0.1
    name: str = "m"
    norm: Norm = RMSNorm()
    select: Select = Both()
    layers: tuple[Layer, ...] = (Layer(),)
    extra: Layer | None = None
    weights: dict[str, float] = Field(default_factory=dict)
    by_name: dict[str, Layer] = Field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: Annotated[float, Field(gt=0)] | None = None
    tied: bool = True
    size: Literal["small", "large"] = "small"
    mode: Mode = Mode.FAST
    path: Path | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Model":
        if self.layers and self.dim % self.layers[0].width:
            raise ValueError(f"width={self.layers[0].width} must divide dim={self.dim}")
        return self


def complaint(cls: type[Config] = Model, **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        cls.from_dict({"dim": 4, **fields} if cls is Model else fields)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"dim": "a"}, 'dim: found "a", expected a whole number'),
        ({"dim": 1.5}, "dim: found 1.5, expected a whole number"),
        ({"dim": True}, "dim: found true, expected a number, not true or false"),
        ({"dim": None}, "dim: found nothing (null), expected a whole number"),
        ({"dim": 0}, "dim: found 0, expected more than 0"),
        ({"dim": 8192}, "dim: found 8192, expected at most 4096"),
        ({"rate": "fast"}, 'rate: found "fast", expected a number'),
        ({"betas": [0.9, True]}, "betas: found [0.9, True], expected a number, not true or false"),
        ({"betas": [0.9]}, "betas.1: missing, and it has no default"),
        ({"betas": 0.9}, "betas: found 0.9, expected a list"),
        ({"clip": True}, "clip: found true, expected a number, not true or false"),
        ({"clip": 0}, "clip: found 0, expected more than 0"),
        ({"tied": "perhaps"}, 'tied: found "perhaps", expected true or false'),
        ({"name": 3}, "name: found 3, expected text"),
        ({"size": "medium"}, "size: found \"medium\", expected one of 'small' or 'large'"),
        ({"mode": "slow"}, "mode: found \"slow\", expected one of 'fast' or 'exact'"),
        ({"path": 3}, "path: found 3, expected a path"),
        ({"weights": [1]}, "weights: found [1], expected a mapping of names to values"),
        ({"weights": {"deu-Latn": "x"}}, 'weights.deu-Latn: found "x", expected a number'),
        ({"by_name": {"-": {"width": ""}}}, 'by_name.-.width: found "", expected a whole number'),
        ({"layers": 3}, "layers: found 3, expected a list"),
        ({"layers": [3]}, "layers.0: found 3, expected a mapping of Layer fields"),
        ({"layers": [{}, {"width": "x"}]}, 'layers.1.width: found "x", expected a whole number'),
        ({"layers": [{"norm": 3}]}, f"layers.0.norm: found 3, {NORMS}"),
        ({"norm": {"eps": 1}}, "norm: found {'eps': 1}, " + NORMS),
        ({"norm": "LayerNorm("}, 'norm: found "LayerNorm(", ' + NORMS),
        ({"norm": "LayerNorm(1)"}, 'norm: found "LayerNorm(1)", ' + NORMS),
        ({"norm": {"kind": "RMSNorm", "eps": "x"}}, 'norm.eps: found "x", expected a number'),
        ({"select": {"kind": "TopK", "k": 0}}, "select.k: found 0, expected at least 1"),
        ({"select": "Both(first=TopK(k=0))"}, "select.first.k: found 0, expected at least 1"),
        ({"select": "Both(second=Both)"}, 'select.second.kind: found "Both", expected one of TopK'),
        ({"extra": {"width": []}}, "extra.width: found [], expected a whole number"),
        ({"dim": 6}, "width=4 must divide dim=6"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_path_found_and_expected(
    fields: dict[str, Any], sentence: str
) -> None:
    assert complaint(**fields) == sentence


@pytest.mark.parametrize(
    ("fields", "path", "near"),
    [
        ({"dimm": 4}, "dimm", "dim"),
        ({"layers": [{"widthh": 1}]}, "layers.0.widthh", "width"),
        ({"extra": {"nrm": "RMSNorm"}}, "extra.nrm", "norm"),
        ({"by_name": {"x": {"widths": 1}}}, "by_name.x.widths", "width"),
        ({"norm": {"kind": "RMSNorm", "epps": 1}}, "norm.epps", "eps"),
        ({"select": {"kind": "Both", "second": {"kk": 1}}}, "select.second.kk", "k"),
        ({"norm": "rmsnorm"}, "norm.kind", "RMSNorm"),
        ({"norm": {"kind": "LayerNrm"}}, "norm.kind", "LayerNorm"),
        ({"layers": [{"norm": "LayrNorm"}]}, "layers.0.norm.kind", "LayerNorm"),
    ],
)
def test_a_wrong_name_is_refused_with_its_path_and_the_nearest_name(
    fields: dict[str, Any], path: str, near: str
) -> None:
    sentence = complaint(**fields)
    assert sentence.startswith(f"{path}: ")
    assert sentence.endswith(f'did you mean "{near}"?')


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Model.from_dict({"rate": "x", "nme": "y", "layers": [{"width": None}]})
    assert [p.split(":")[0] for p in caught.value.problems] == [
        "dim", "rate", "layers.0.width", "nme",
    ]  # fmt: skip


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^dim: missing, and it has no default$"):
        Model.from_dict({})


@pytest.mark.parametrize("value", [None, 3, "text", ["dim"]])
def test_what_is_not_a_mapping_is_no_config(value: object) -> None:
    with pytest.raises(ConfigError, match="expected a mapping of Model fields"):
        Model.from_dict(value)


def test_the_constructor_and_replace_complain_in_the_same_words() -> None:
    with pytest.raises(UserError, match=r'^dim: found "x", expected a whole number$'):
        Model(dim="x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match='did you mean "width"'):
        Layer().replace(widthh=3)
    with pytest.raises(ConfigError, match=r"^second.k: found 0, expected at least 1$"):
        Both(second={"k": 0})  # pyright: ignore[reportArgumentType]


def test_replace_changes_a_copy() -> None:
    model = Model(dim=4)
    assert model.replace(dim=8).dim == 8
    assert model.dim == 4


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Model(dim=4).dim = 8  # pyright: ignore[reportAttributeAccessIssue]


def test_a_family_is_not_a_member() -> None:
    with pytest.raises(TypeError, match="Norm is a family: choose one of RMSNorm, LayerNorm"):
        Norm()


def test_a_class_that_a_user_defines_joins_its_family() -> None:
    class Mine(Norm):
        gain: float = 2.0

    try:
        assert Model(dim=4).override(["norm=Mine(gain=3)"]).norm == Mine(gain=3)
    finally:
        del Norm.members["Mine"]


def test_a_base_of_some_members_is_none_itself() -> None:
    class Part(Norm):
        @abstractmethod
        def axis(self) -> int: ...

    class Last(Part):
        def axis(self) -> int:
            return -1

    assert "Part" not in Norm.members
    assert Norm.members.pop("Last") is Last


def test_two_members_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"already has a RMSNorm, from .*choose another"):
        type("RMSNorm", (Norm,), {"__module__": "mine", "__qualname__": "RMSNorm"})
    assert Norm.members["RMSNorm"] is RMSNorm


def test_a_member_may_be_defined_again_in_its_place() -> None:
    def cell() -> type[Norm]:
        class Cell(Norm):
            pass

        return Cell

    cell()
    assert Norm.members.pop("Cell") is not cell()
    Norm.members.pop("Cell")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RMSNorm", RMSNorm()),
        (" RMSNorm() ", RMSNorm()),
        ("RMSNorm(eps=1e-3)", RMSNorm(eps=1e-3)),
        ("LayerNorm(bias=true, eps=1)", LayerNorm(bias=True, eps=1)),
        ("LayerNorm(bias=True)", LayerNorm(bias=True)),
        ({"kind": "LayerNorm"}, LayerNorm()),
    ],
)
def test_a_choice_is_read_from_its_name_its_call_or_a_mapping(text: object, expected: Norm) -> None:
    assert Norm.from_dict(text) == expected
    assert Layer.from_dict({"norm": text}).norm == expected


def test_calls_may_stand_inside_calls() -> None:
    text = "Both(first=Both(first=TopK), second=TopK(k=3))"
    assert Select.from_dict(text) == Both(first=Both(first=TopK()), second=TopK(k=3))


norms = st.one_of(
    st.builds(RMSNorm, eps=st.floats(0, 1e6)),
    st.builds(LayerNorm, eps=st.floats(allow_nan=False, allow_infinity=False), bias=st.booleans()),
)
layers = st.builds(Layer, norm=norms, width=st.integers(1, 2**63 - 1))
top = st.builds(TopK, k=st.integers(1, 9))
selects = st.recursive(top, lambda inner: st.builds(Both, first=inner, second=top), max_leaves=4)
models = st.builds(
    Model,
    dim=st.integers(1, 4096),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    name=st.text(),
    norm=norms,
    select=selects,
    layers=st.lists(layers, max_size=2).map(lambda ls: tuple(x.replace(width=1) for x in ls)),
    extra=st.none() | layers,
    weights=st.dictionaries(
        st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=2
    ),
    by_name=st.dictionaries(st.text(), layers, max_size=2),
    clip=st.none() | st.floats(1e-9, 1),
    tied=st.booleans(),
    mode=st.sampled_from(Mode),
    path=st.none() | st.just(Path("a/b")),
)


@given(models)
def test_a_config_reads_back_what_it_writes(model: Model) -> None:
    assert Model.from_yaml(model.to_yaml()) == model
    assert Model.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    assert pickle.loads(pickle.dumps(model)) == model
    assert copy.deepcopy(model) == model


@given(models)
def test_flat_lines_hold_each_value_once(model: Model) -> None:
    lines = model.to_flat_lines()
    assert lines == sorted(lines)
    assert all(" = " in line for line in lines)
    assert model.replace(rate=model.rate).to_flat_lines() == lines
    assert model.replace(tied=not model.tied).to_flat_lines() != lines


def test_flat_is_readable() -> None:
    assert Layer(norm=RMSNorm()).to_flat_lines() == [
        "norm.eps = 1.0e-06",
        "norm.kind = RMSNorm",
        "width = 4",
    ]
    lines = Model(dim=4, weights={"a": 1}).to_flat_lines()
    assert "betas = [0.9, 0.95]" in lines
    assert "layers.0.norm.bias = true" in lines
    assert "weights.a = 1.0" in lines
    assert "by_name = {}" in lines
    assert "extra = null" in lines


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("dim: 4\ndim: 8", 'the key "dim" is repeated'),
        ("dim: 4\nnorm: {kind: RMSNorm, eps: 1, eps: 2}", 'the key "eps" is repeated'),
        ("dim: [", "not valid YAML"),
        ("- dim", "expected a mapping of Model fields"),
        ("", "expected a mapping of Model fields"),
        ("!!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_yaml_that_is_no_config_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        Model.from_yaml(text)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["dim=8"], Model(dim=8)),
        (["rate=1e-3"], Model(dim=4, rate=1e-3)),
        (["clip=0.5", "clip=null"], Model(dim=4)),
        (["betas=[0.5, 0.6]"], Model(dim=4, betas=(0.5, 0.6))),
        (["betas.1=0.6"], Model(dim=4, betas=(0.9, 0.6))),
        (["layers.0.width=2"], Model(dim=4, layers=(Layer(width=2),))),
        (["layers=[{width: 1}, {}]"], Model(dim=4, layers=(Layer(width=1), Layer()))),
        (["norm.eps=0.5"], Model(dim=4, norm=RMSNorm(eps=0.5))),
        (["norm=LayerNorm"], Model(dim=4, norm=LayerNorm())),
        (["norm=LayerNorm", "norm.bias=true"], Model(dim=4, norm=LayerNorm(bias=True))),
        (["norm={kind: LayerNorm, bias: true}"], Model(dim=4, norm=LayerNorm(bias=True))),
        (["norm.kind=LayerNorm", "norm.bias=true"], Model(dim=4, norm=LayerNorm(bias=True))),
        (["select.second.k=3"], Model(dim=4, select=Both(second=TopK(k=3)))),
        (["extra.width=2"], Model(dim=4, extra=Layer(width=2))),
        (["weights.deu_Latn=2"], Model(dim=4, weights={"deu_Latn": 2})),
        ([" dim = 8"], Model(dim=8)),
    ],
)
def test_override_sets_one_path(changes: list[str], expected: Model) -> None:
    assert Model(dim=4).override(changes) == expected


def test_another_kind_resets_the_fields_of_the_choice() -> None:
    start = Layer(norm=LayerNorm(eps=0.5, bias=True))
    assert start.override(["norm.kind=RMSNorm"]).norm == RMSNorm()
    assert start.override(["norm.kind=LayerNorm"]).norm == LayerNorm()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("dim", '--set "dim": expected path=value'),
        ("=3", '--set "=3": expected path=value'),
        ("a..b=3", '--set "a..b=3": expected path=value'),
        ("dim={", '--set "dim={": the value is not valid YAML'),
        ("dim.x=3", "dim.x: dim is 4, not a record"),
        ("layers.1.width=3", "layers.1: layers has the places 0 to 0"),
        ("layers.first.width=3", "layers.first: layers has the places 0 to 0"),
        ("dimm=3", 'did you mean "dim"?'),
        ("layers.0.widthh=3", 'layers.0.widthh: unknown key, expected one of norm, width; did'),
        ("nrm.eps=3", 'nrm: unknown key'),
        ("norm.epps=3", 'did you mean "eps"?'),
        ("norm.kind=RMSNrm", 'norm.kind: found "RMSNrm"'),
        ("norm.kind=LayerNorm(bias=true)", 'norm.kind: found "LayerNorm(bias=true)"'),
    ],
)  # fmt: skip
def test_an_override_that_leads_nowhere_is_refused(change: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        Model(dim=4).override([change])


def test_a_long_value_is_shown_in_part() -> None:
    assert len(complaint(rate="x" * 500)) < 120


@pytest.mark.parametrize("value", ["inf", "1e400", "-inf", "nan", float("inf")])
def test_a_number_that_is_not_finite_is_refused_as_text_too(value):
    """The text 1e400 became a learning rate of infinity, and training ran until the loss was."""

    class Rate(Config):
        rate: float = 1.0

    with pytest.raises(ConfigError, match=r"rate: found .*, expected a finite number"):
        Rate.from_dict({"rate": value})
