"""One idea: a config is a frozen, nested, plain value that reads and writes itself as text.

Two kinds. ``Config`` is a record. ``Choice`` is a family of records of which the user picks one:
a direct subclass of ``Choice`` names the family (``Select``), its subclasses are the members
(``TopK``), and a member is written as ``{kind: TopK, k: 2}`` or ``TopK(k=2)``. A member that a
user defines in their own file joins the family by being defined.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic import ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema

from moesaic.core.errors import ConfigError, nearest

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


class Config(BaseModel):
    """Base of every config. Plain data: no tensors, no processes, no files."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, info: Any) -> object:
        annotation = cls.model_fields[info.field_name].annotation
        wanted = set(get_args(annotation)) | {annotation}
        if isinstance(value, bool) and wanted & {int, float} and bool not in wanted:
            raise PydanticCustomError("number_type", "a number, not true or false")
        return value

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like a new one."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return _checked(type(self), own | changes)

    def plain(self) -> dict[str, Plain]:
        """Return the config as nested dicts, lists and scalars (what YAML and JSON hold)."""
        own = {name: _plain(getattr(self, name)) for name in type(self).model_fields}
        return {"kind": type(self).__name__, **own} if isinstance(self, Choice) else own

    def flat(self) -> list[str]:
        """Return sorted ``a.b.c = value`` lines: for golden files, diffs and ``--set``."""
        return sorted(f"{path} = {_scalar(value)}" for path, value in _leaves(self.plain(), ""))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Check ``value`` (nested dicts). Raises ConfigError naming every wrong key."""
        if not isinstance(value, Mapping):
            raise ConfigError(
                [f"expected a mapping of {cls.__name__} fields, found {_shown(value)}"]
            )
        return _checked(cls, dict(value))

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        try:
            return cls.from_plain(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError([f"not valid YAML: {' '.join(str(error).split())}"]) from error

    def override(self, changes: list[str]) -> Self:
        """Apply ``path=value`` texts, e.g. ``["model.dim=64", "model.norm=LayerNorm"]``.

        Values are read as YAML. Raises ConfigError on an unknown path or a wrong value.
        """
        tree = self.plain()
        for change in changes:
            path, equals, text = change.partition("=")
            if not equals:
                raise ConfigError([f'--set "{change}": expected path=value'])
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ConfigError([f'--set "{change}": the value is not valid YAML']) from error
            _assign(tree, path.strip().split("."), value)
        return type(self).from_plain(tree)


class Choice(Config):
    """Base of the families. See the module's first lines."""

    members: ClassVar[dict[str, type["Choice"]]] = {}

    def __init__(self, **fields: Any) -> None:
        if self._is_family():
            raise TypeError(
                f"{type(self).__name__} is a family: choose one of {', '.join(self.members)}"
            )
        super().__init__(**fields)

    @model_validator(mode="before")
    @classmethod
    def _drop_own_kind(cls, value: object) -> object:
        # a field typed as one member is written with its kind, so it must read it too
        if isinstance(value, Mapping) and value.get("kind") == cls.__name__:
            return {name: v for name, v in value.items() if name != "kind"}
        return value

    @classmethod
    def _is_family(cls) -> bool:
        return cls.__mro__.index(Config) <= 2  # Choice itself is at 1, a family at 2, a member at 3

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls._is_family():
            cls.members = {}
        else:
            cls.members[cls.__name__] = cls

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        if cls._is_family():
            return core_schema.no_info_plain_validator_function(cls._choose)
        return handler(source)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        if not cls._is_family():
            return handler(schema)
        shapes = []
        for name, member in cls.members.items():
            shape = dict(handler.resolve_ref_schema(handler(member.__pydantic_core_schema__)))
            shape["properties"] = {"kind": {"const": name}} | shape.get("properties", {})
            shape["required"] = ["kind", *shape.get("required", [])]
            shapes.append(shape)
        return {"oneOf": shapes}

    @classmethod
    def _choose(cls, value: object) -> "Choice":
        if isinstance(value, cls):
            return value
        fields = _call_form(value) if isinstance(value, str) else value
        if not isinstance(fields, Mapping) or "kind" not in fields:
            known = ", ".join(cls.members)
            raise PydanticCustomError("choice", "one of {known} (as a kind)", {"known": known})
        kind = str(fields["kind"])
        if kind not in cls.members:
            hint = nearest(kind, cls.members)
            known = ", ".join(cls.members)
            raise PydanticCustomError(
                "choice", "one of {known}{hint}", {"known": known, "hint": hint}
            )
        member = cls.members[kind]
        rest = {name: v for name, v in fields.items() if name != "kind"}
        try:
            return member.model_validate(rest)
        except ValidationError as error:
            inner = _problems(member, error)
            raise PydanticCustomError("inside", "{inner}", {"inner": inner}) from error


def _call_form(text: str) -> dict[str, object] | None:
    """Read ``TopK`` or ``TopK(k=2)``."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text, flags=re.DOTALL)
    if not match:
        return None
    try:
        call = ast.parse(f"f({match[2] or ''})", mode="eval").body
        assert isinstance(call, ast.Call)
        fields = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        return None
    return {"kind": match[1], **fields} if not call.args else None


C = TypeVar("C", bound=Config)


def _checked(cls: type[C], fields: dict[str, Any]) -> C:
    if issubclass(cls, Choice):
        fields.pop("kind", None)
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{p}: {why}" for p, why in _problems(cls, error)) from error


def _problems(cls: type[Config], error: ValidationError) -> list[tuple[str, str]]:
    found = []
    for item in error.errors(include_url=False):
        # pydantic names the branch of a union in the path; the user never wrote it
        steps = [str(s) for s in item["loc"] if "[" not in str(s) and "-" not in str(s)]
        path, context = ".".join(steps), item.get("ctx", {})
        if item["type"] == "inside":
            found += [(f"{path}.{p}" if p else path, why) for p, why in context["inner"]]
        elif item["type"] == "extra_forbidden":
            owner = _owner(cls, steps[:-1])
            known = owner.model_fields if owner else {}
            expected = f"expected one of {', '.join(known)}" if known else "not a known key"
            found.append((path, f"unknown key, {expected}{nearest(steps[-1], known)}"))
        elif item["type"] == "missing":
            found.append((path, "missing, and it has no default"))
        else:
            message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            found.append((path, f"found {_shown(item['input'])}, expected {message}"))
    return found


def _owner(cls: type[Config], steps: list[str]) -> type[Config] | None:
    for step in steps:
        if step.isdigit():
            continue
        if step not in cls.model_fields:
            return None
        annotation = cls.model_fields[step].annotation
        inner = [annotation, *get_args(annotation)]
        found = [t for t in inner if isinstance(t, type) and issubclass(t, Config)]
        if not found:
            return None
        cls = found[0]
    return cls


def _assign(tree: dict[str, Any], steps: list[str], value: object) -> None:
    here: Any = tree
    for depth, step in enumerate(steps):
        index: Any = int(step) if isinstance(here, list) and step.isdigit() else step
        known = range(len(here)) if isinstance(here, list) else here
        if not isinstance(here, (dict, list)) or index not in known:
            path = ".".join(steps[: depth + 1])
            names = [str(k) for k in known] if isinstance(here, (dict, list)) else []
            expected = f", expected one of {', '.join(names)}" if names else ""
            raise ConfigError([f"{path}: unknown key{expected}{nearest(step, names)}"])
        if depth == len(steps) - 1:
            # a new kind brings new fields: those of the old kind would be unknown to it
            here[index] = value
            if step == "kind":
                _keep_common_fields(here)
        else:
            here = here[index]


def _keep_common_fields(here: dict[str, Any]) -> None:
    for name in [k for k in here if k != "kind"]:
        del here[name]


def _plain(value: Any) -> Plain:
    if isinstance(value, Config):
        return value.plain()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _leaves(value: Plain, path: str) -> Iterator[tuple[str, Plain]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{i}")
    else:
        yield path, value


def _scalar(value: Plain) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
