"""One idea: a config is a frozen, nested, plain value that reads and writes itself as text.

Two kinds. ``Config`` is a record. ``Choice`` is a family of records of which the user picks one:
a direct subclass of ``Choice`` names the family (``Select``), its subclasses are the members
(``TopK``), and a member is written as ``{kind: TopK, k: 2}`` or ``TopK(k=2)``. A member that a
user defines in their own file joins the family by being defined.
"""

import json
from collections.abc import Iterator, Mapping
from enum import Enum
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
    read_yaml,
    set_by_path,
    write_yaml,
)
from moesaic.core.config_upgrade import UPGRADE_HINT, describe_renames, upgrade_config
from moesaic.core.errors import ConfigError, did_you_mean
from moesaic.core.schema import json_schema


class Config(BaseModel):
    """Base of every config. Plain data: no tensors, no processes, no files.

    A string literal below a field is its description in the JSON Schema. A wrong value raises
    ConfigError, wherever it is given: constructor, ``replace``, YAML or ``override``.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(describe_errors(type(self), error, given=fields)) from error

    # pydantic itself builds nested configs without calling it, so that paths stay whole
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, info: Any) -> object:
        wanted = set(_leaf_types(cls.model_fields[info.field_name].annotation))
        if bool in wanted or not wanted & {int, float}:
            return value
        if any(
            isinstance(v, bool) for v in (value if isinstance(value, list | tuple) else [value])
        ):
            raise PydanticCustomError("number_type", "a number, not true or false")
        return value

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like a new one."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**own | changes)

    def to_dict(self) -> dict[str, JsonValue]:
        """Return the config as nested dicts, lists and scalars (what YAML and JSON hold)."""
        own = {name: _to_json_value(getattr(self, name)) for name in type(self).model_fields}
        return {"kind": type(self).__name__, **own} if isinstance(self, Choice) else own

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
                raise ConfigError([*describe_renames(renamed), UPGRADE_HINT]) from error
            raise ConfigError(describe_errors(cls, error, given=value)) from error

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read what ``to_yaml`` writes. Raises ConfigError, for a key that stands twice too."""
        return cls.from_dict(read_yaml(text))

    @classmethod
    def schema_json(cls, **_: Any) -> str:
        """Return the JSON Schema of the plain form, for editors; docstrings are descriptions."""
        schema = json_schema(cls, families=Choice.families)
        return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"

    def override(self, changes: list[str]) -> Self:
        """Apply ``path=value`` texts in order, e.g. ``["model.dim=64", "model.norm=LayerNorm"]``.

        Values are read as YAML; a number in the path is a place in a list. Naming another member
        of a family, as ``model.norm=LayerNorm`` or ``model.norm.kind=LayerNorm``, resets the other
        fields of that choice to the new member's defaults: those of the old one say nothing about
        it. Raises ConfigError on an unknown path or a wrong value.
        """
        tree = self.to_dict()
        for change in changes:
            set_by_path(tree, change)
        return type(self).from_dict(tree)


class Choice(Config):
    """Base of the families. See the module's first lines."""

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
        twin = cls.members.setdefault(cls.__name__, cls)
        if _qualified_name(twin) != _qualified_name(cls):
            why = f"the family already has a {cls.__name__}, from {twin.__module__}"
            raise ConfigError([f"{_qualified_name(cls)}: {why}; choose another class name"])
        cls.members[cls.__name__] = cls  # a module loaded again, or a notebook cell run twice

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
        if cls._is_family_base():  # core/schema.py puts the members in
            about = {"description": cls.__doc__} if cls.__doc__ else {}
            return {"family": _qualified_name(cls), "title": cls.__name__, **about}
        own = handler(schema)
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
    sentence = f"found {show_value(kind)}, expected one of {', '.join(known)}{did_you_mean(str(kind), known)}"
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


def _leaf_types(annotation: Any) -> Iterator[Any]:
    """``int`` of ``Annotated[int, ...] | None``; nothing of a record or a choice is looked into."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for part in inner:
        yield from _leaf_types(part)
