"""Config error messages: pydantic's errors as ``(path, sentence)``."""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from moesaic.core.errors import did_you_mean, printable

# the repr of a large or deep value is not made as a whole, to show its start
_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxlist = _SHORT_REPR.maxdict = _SHORT_REPR.maxtuple = 20

# pydantic's error type -> the expected value in words ({...} from the error's context)
EXPECTED_PHRASES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "path_type": "a path",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "one of {expected}",
    "enum": "one of {expected}",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping of names to values",
    "mapping_type": "a mapping of names to values",
    "model_type": "a mapping of {class_name} fields",
    "model_attributes_type": "a mapping of {class_name} fields",
    "invalid_key": "a name (text)",
    "none_required": "nothing (null)",
    "too_short": "at least {min_length} entries, there are {actual_length}",
    "too_long": "at most {max_length} entries",
}


def describe_errors(cls: type[BaseModel], error: ValidationError, *, given: object) -> list[str]:
    """Return one sentence per wrong key of ``given``, the input for a ``cls``."""
    return [
        f"{path}: {why}" if path else why for path, why in locate_errors(cls, error, given=given)
    ]


def locate_errors(
    cls: type[BaseModel], error: ValidationError, *, given: object
) -> list[tuple[str, str]]:
    """Return ``(path, sentence)`` per wrong key; an error inside a choice has its own list."""
    found: list[tuple[str, str]] = []
    for item in error.errors(include_url=False):
        steps = _user_path(item["loc"], given, missing=item["type"] == "missing")
        path, context = ".".join(steps), item.get("ctx", {})
        match item["type"]:
            case "inside":
                found += [(f"{path}.{p}".strip("."), why) for p, why in context["inner"]]
            case "extra_forbidden":
                found.append(
                    (path, describe_unknown_key(steps[-1], _field_names_at(cls, steps[:-1])))
                )
            case "missing":
                found.append((path, "missing, and it has no default"))
            case "value_error":  # raised by a validator: the sentence is complete
                found.append((path, str(context["error"])))
            case kind:
                limits = {k: f"{v:.12g}" if isinstance(v, float) else v for k, v in context.items()}
                text = (
                    EXPECTED_PHRASES[kind].format(**limits)
                    if kind in EXPECTED_PHRASES
                    else item["msg"]
                )
                found.append((path, f"found {show_value(item['input'])}, expected {text}"))
    return found


def describe_unknown_key(name: str, known: list[str]) -> str:
    """Return the sentence about a name that is not one of ``known``."""
    expected = f"expected one of {', '.join(known)}" if known else "there is nothing of that name"
    return f"unknown key, {expected}{did_you_mean(name, known)}"


def show_value(value: object) -> str:
    """Return ``value`` as in YAML, shortened for a sentence."""
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return printable(f'"{value}"')
    if isinstance(value, int) and value.bit_length() > 190:  # repr refuses 4,300 digits and more
        return f"a whole number of about {round(value.bit_length() * 0.30103):,} digits"
    return printable(_SHORT_REPR.repr(value))


def _user_path(steps: tuple[int | str, ...], given: object, *, missing: bool) -> list[str]:
    """Drop the steps that are not in the user's input: pydantic adds the branches of a union."""
    kept, here = [], given
    for step in steps:
        match here:
            case Mapping() if step in here:
                here = here[step]
            case list() | tuple() if isinstance(step, int) and step < len(here):
                here = here[step]
            case _ if not (missing and step == steps[-1]):
                continue
        kept.append(str(step))
    return kept


def _field_names_at(cls: type[BaseModel], steps: list[str]) -> list[str]:
    """Return the field names of the record at the path ``steps`` in ``cls``."""
    owners = [cls]
    for step in steps:
        here = [owner.model_fields[step] for owner in owners if step in owner.model_fields]
        if here:  # no field: a key of a mapping or a place in a list
            owners = [model for field in here for model in _record_types(field.annotation)]
    return [name for owner in owners for name in owner.model_fields]


def _record_types(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _record_types(inner)
