"""Configs: frozen, nested pydantic models that are read from and written as YAML.

``Config`` is a record. ``Choice`` is a tagged union of records: a direct subclass of ``Choice`` is
a family (``Select``), its subclasses are the members (``TopK``). A member is written as
``{kind: TopK, k: 2}`` or ``TopK(k=2)``. Defining a subclass adds a member to its family, in user
code too.
"""

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import PurePath
from typing import Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from moesaic.core.config_errors import describe_errors, locate_errors, show_value
from moesaic.core.config_text import (
    JsonValue,
    flat_lines,
    parse_call,
    quoted_call,
    set_by_path,
    write_yaml,
)
from moesaic.core.config_upgrade import earlier_version_problem, upgrade_config
from moesaic.core.errors import ConfigError, did_you_mean
from moesaic.core.file_reader import MAX_INT
from moesaic.core.schema import describe_fields, json_schema
from moesaic.core.yaml_reader import read_yaml


class Config(BaseModel):
    """Base class of all configs: plain data without tensors, processes or files.

    A string literal below a field is its description in the JSON Schema. A wrong value raises
    ConfigError, in the constructor, ``replace``, YAML and ``override`` alike.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,  # also of a text: --set optimizer.lr=1e400
    )

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(describe_errors(type(self), error, given=fields)) from error

    # pydantic builds nested configs without calling __init__, so that error paths are complete
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    @field_validator("*", mode="before")
    @classmethod
    def _check_numbers(cls, value: object, info: Any) -> object:
        allowed = _allowed_types(cls, info.field_name)
        if not allowed & {int, float}:
            return value
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) and bool not in allowed:
                raise PydanticCustomError("number_type", "a number, not true or false")
            if isinstance(number, int) and abs(number) > MAX_INT:
                raise PydanticCustomError("int_64_bits", "a number of 64 bits")
            if isinstance(number, float) and not math.isfinite(number):
                raise PydanticCustomError("finite_number", "a finite number")
        return value

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**fields | changes)

    def to_dict(self) -> dict[str, JsonValue]:
        """Return the config as nested dicts, lists and scalars, for YAML and JSON."""
        fields = {name: _to_json_value(getattr(self, name)) for name in type(self).model_fields}
        return {"kind": type(self).__name__, **fields} if isinstance(self, Choice) else fields

    def to_flat_lines(self) -> list[str]:
        """Return sorted ``a.b.c = value`` lines: for golden files, diffs and ``--set``."""
        return flat_lines(self.to_dict())

    def to_yaml(self) -> str:
        """Return the YAML that ``from_yaml`` reads back to an equal config."""
        return write_yaml(self.to_dict())

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """Check ``value`` (nested dicts). Raises ConfigError naming every wrong key."""
        if not isinstance(value, Mapping) and not issubclass(cls, Choice):
            expected = f"expected a mapping of {cls.__name__} fields"
            raise ConfigError([f"found {show_value(value)}, {expected}"])
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            _, renamed = upgrade_config(value, config=cls.__name__)
            if renamed:
                raise ConfigError([earlier_version_problem(renamed)]) from error
            raise ConfigError(describe_errors(cls, error, given=value)) from error

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read the output of ``to_yaml``. Raises ConfigError, also for a repeated key."""
        return cls.from_dict(read_yaml(text))

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        own = handler(schema)
        describe_fields(handler.resolve_ref_schema(own), of=cls)
        return own

    @classmethod
    def schema_json(cls, **_: Any) -> str:
        """Return the JSON Schema of ``to_dict``, for editors; docstrings are descriptions."""
        schema = json_schema(cls, families=Choice.families)
        return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"

    def override(self, changes: list[str]) -> Self:
        """Apply ``path=value`` texts in order, e.g. ``["model.dim=64", "model.norm=LayerNorm"]``.

        Values are read as YAML; a number in the path is a place in a list. Naming another member
        of a family, as ``model.norm=LayerNorm`` or ``model.norm.kind=LayerNorm``, resets the other
        fields of that choice to the new member's defaults. Raises ConfigError on an unknown path or
        a wrong value.
        """
        tree = self.to_dict()
        for change in changes:
            set_by_path(tree, change)
        return type(self).from_dict(tree)


class Choice(Config):
    """Base class of families (tagged unions): see the module's docstring."""

    families: ClassVar[dict[str, dict[str, type["Choice"]]]] = {}
    members: ClassVar[dict[str, type["Choice"]]] = {}

    def __init__(self, **fields: Any) -> None:
        if self._is_family_base():
            known = ", ".join(self.members)
            raise TypeError(f"{type(self).__name__} is a family: choose one of {known}")
        super().__init__(**fields)

    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    @classmethod
    def _is_family_base(cls) -> bool:
        return cls.__mro__.index(Config) <= 2  # Choice itself is at 1, a family at 2, a member at 3

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls._is_family_base():
            cls.members = cls.families[_qualified_name(cls)] = {}
            return
        if inspect.isabstract(cls):  # what several members share is none itself
            return
        twin = cls.members.setdefault(cls.__name__, cls)
        if _qualified_name(twin) != _qualified_name(cls):
            why = f"the family already has a {cls.__name__}, from {twin.__module__}"
            raise ConfigError([f"{_qualified_name(cls)}: {why}; choose another class name"])
        cls.members[cls.__name__] = cls  # a reloaded module, or a notebook cell run again

    @model_validator(mode="before")
    @classmethod
    def _read_kind(cls, value: Any) -> Any:
        fields = parse_call(value) if isinstance(value, str) else value
        if not isinstance(fields, Mapping) or "kind" not in fields:
            return value
        if fields["kind"] != cls.__name__:
            raise _unknown_kind_error(fields["kind"], [cls.__name__])
        return {name: inner for name, inner in fields.items() if name != "kind"}

    @model_serializer(mode="plain")
    def _serialize(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        if cls._is_family_base():
            return core_schema.no_info_plain_validator_function(cls._validate_choice)
        return handler(source)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        if cls._is_family_base():  # core/schema.py adds the members
            about = {"description": cls.__doc__} if cls.__doc__ else {}
            return {"family": _qualified_name(cls), "title": cls.__name__, **about}
        own = super().__get_pydantic_json_schema__(schema, handler)
        shape = handler.resolve_ref_schema(own)
        shape["properties"] = {"kind": {"const": cls.__name__}} | shape.get("properties", {})
        return own

    @classmethod
    def _validate_choice(cls, value: object) -> "Choice":
        if isinstance(value, cls):
            return value
        fields = parse_call(value) if isinstance(value, str) else value
        if not isinstance(fields, Mapping) or "kind" not in fields:
            known = list(cls.members)
            if isinstance(value, str) and (quoted := quoted_call(value)):
                hint = f"found {show_value(value)}: a text needs quotes, as in '{quoted}'"
                raise PydanticCustomError("inside", "{inner}", {"inner": [("", hint)]})
            about = {"known": ", ".join(known), "first": f"{{kind: {known[0]}}}" if known else ""}
            raise PydanticCustomError("choice", "one of {known}, e.g. {first}", about)
        if (kind := str(fields["kind"])) not in cls.members:
            raise _unknown_kind_error(kind, list(cls.members))
        try:
            return cls.members[kind].model_validate(fields)
        except ValidationError as error:
            inner = locate_errors(cls.members[kind], error, given=fields)
            raise PydanticCustomError("inside", "{inner}", {"inner": inner}) from error


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _unknown_kind_error(kind: object, known: list[str]) -> PydanticCustomError:
    hint = did_you_mean(str(kind), known)
    sentence = f"found {show_value(kind)}, expected one of {', '.join(known)}{hint}"
    return PydanticCustomError("inside", "{inner}", {"inner": [("kind", sentence)]})


def _to_json_value(value: Any) -> JsonValue:
    match value:
        case Config():
            return value.to_dict()
        case list() | tuple():
            return [_to_json_value(v) for v in value]
        case Mapping():
            return {str(k): _to_json_value(v) for k, v in value.items()}
        case PurePath():
            return str(value)
        case Enum():
            return value.value
    return value


@cache
def _allowed_types(cls: type[Config], field: str) -> frozenset[Any]:
    return frozenset(_leaf_types(cls.model_fields[field].annotation))


def _leaf_types(annotation: Any) -> Iterator[Any]:
    """Yield ``int`` of ``Annotated[int, ...] | None``, without the fields of records."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for part in inner:
        yield from _leaf_types(part)
