"""Config mapping: the keys of a foreign ``config.json`` and the fields of a ``ModelConfig``.

An entry is read in both directions. What no entry maps is constant: on our side it is that of the
family's template, on theirs an entry ``FixedKey``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from moesaic.core.config import Config
from moesaic.core.config_errors import show_value
from moesaic.core.errors import ConfigError
from moesaic.model.config import ModelConfig

Theirs = Mapping[str, Any]
_REQUIRED: Any = object()
_ABSENT: Any = object()


class _KeysRead(Mapping[str, Any]):
    """A config that notes which of its keys an entry read."""

    def __init__(self, values: Theirs) -> None:
        self.values_by_key, self.read = values, dict[str, Any]()

    def __getitem__(self, key: str) -> Any:
        self.read[key] = self.values_by_key.get(key)
        return self.values_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)


class ConfigEntry(ABC):
    """Family of the ways in which fields of two configs correspond."""

    @abstractmethod
    def read(self, theirs: Theirs) -> dict[str, Any]:
        """Return our fields by path. Raises ConfigError."""

    @property
    def numbers(self) -> Mapping[str, str]:
        """The keys of theirs that are one number of ours, with its path."""
        return {}

    @abstractmethod
    def write(self, ours: ModelConfig) -> dict[str, Any]:
        """Return their keys, as far as our config has something to say about them."""


@dataclass(frozen=True)
class Key(ConfigEntry):
    """A key of theirs that is a field of ours, or several fields.

    ``default`` is what an absent or empty key means; ``values`` translates theirs to ours;
    ``also`` is another name of the key in files of other versions.
    """

    key: str
    path: str | Sequence[str]
    default: Any = _REQUIRED
    values: Mapping[Any, Any] = field(default_factory=dict)
    also: str = ""

    def read(self, theirs: Theirs) -> dict[str, Any]:
        value = theirs.get(self.key, theirs.get(self.also))
        if value is None:
            if self.default is _REQUIRED:
                raise ConfigError([f"found no {self.key}"])
            value = self.default
        if self.values:
            if value not in self.values:
                known = ", ".join(map(show_value, self.values))
                raise ConfigError([f"{self.key}: found {show_value(value)}, expected {known}"])
            value = self.values[value]
        return dict.fromkeys(self._paths, value)

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        value = field_of(ours, self._paths[0])
        back = {ours: theirs for theirs, ours in self.values.items()}
        if value is _ABSENT or (self.values and value not in back):
            return {}
        return {self.key: back[value] if self.values else value}

    @property
    def numbers(self) -> Mapping[str, str]:
        return {name: self._paths[0] for name in (self.key, self.also) if name}

    @property
    def _paths(self) -> Sequence[str]:
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True)
class EqualKeys(ConfigEntry):
    """Keys of theirs that must have one value, which is that of our fields."""

    keys: Sequence[str]
    paths: Sequence[str]

    def read(self, theirs: Theirs) -> dict[str, Any]:
        found = {key: theirs.get(key) for key in self.keys}
        value = found[self.keys[0]]
        if value is None or any(other != value for other in found.values()):
            shown = ", ".join(f"{key}={show_value(found[key])}" for key in self.keys)
            raise ConfigError([f"found {shown}, of which we have one number alone"])
        return dict.fromkeys(self.paths, value)

    @property
    def numbers(self) -> Mapping[str, str]:
        return dict.fromkeys(self.keys, self.paths[0])

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        value = field_of(ours, self.paths[0])
        return {} if value is _ABSENT else dict.fromkeys(self.keys, value)


@dataclass(frozen=True)
class FixedKey(ConfigEntry):
    """A key of theirs that must have this value; ``same`` are others that mean the same."""

    key: str
    value: Any
    default: Any = _REQUIRED
    same: tuple[Any, ...] = ()

    def read(self, theirs: Theirs) -> dict[str, Any]:
        default = self.value if self.default is _REQUIRED else self.default
        value = theirs.get(self.key, default)
        if value != self.value and value not in self.same:
            wanted = show_value(self.value)
            raise ConfigError(
                [f"{self.key}: found {show_value(value)}, of which we have {wanted} alone"]
            )
        return {}

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        del ours
        return {self.key: self.value}


@dataclass(frozen=True)
class ConfigMapping:
    """A template of a family's models, and the entries that change it.

    ``other_keys`` are of no consequence for what a model computes.
    """

    template: ModelConfig
    entries: tuple[ConfigEntry, ...]
    other_keys: frozenset[str] = frozenset()

    COMMON_KEYS: ClassVar[frozenset[str]] = frozenset(
        """architectures model_type torch_dtype dtype transformers_version use_cache name_or_path
        _name_or_path bos_token_id eos_token_id pad_token_id decoder_start_token_id
        forced_bos_token_id forced_eos_token_id initializer_range max_position_embeddings
        attention_dropout output_router_logits pretraining_tp is_encoder_decoder auto_map
        return_dict tie_word_embeddings id2label label2id task_specific_params
        chunk_size_feed_forward problem_type attn_implementation unsloth_version max_length
        num_beams early_stopping head_dim rope_theta rope_scaling rope_parameters
        """.split()  # noqa: SIM905 - one line would be a page
    )

    def read(self, theirs: Theirs) -> ModelConfig:
        """Return our config. Raises ConfigError with every entry that could not be read."""
        tree, problems = self.template.to_dict(), []
        for entry in self.entries:
            keys = _KeysRead(theirs)
            try:
                for path, value in entry.read(keys).items():
                    _set_field(tree, path, value)
            except ConfigError as error:
                problems += error.problems
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
                found = ", ".join(f"{key}={show_value(v)}" for key, v in keys.read.items() if key)
                problems.append(f"found {found}, of which one is not of the kind that is expected")
        if problems:
            raise ConfigError(problems)
        try:
            return ModelConfig.from_dict(tree)
        except ConfigError as error:
            raise ConfigError(map(self._in_their_names(theirs), error.problems)) from error

    def write(self, ours: ModelConfig) -> dict[str, Any]:
        """Return their keys; ``read`` says whether they are the same model."""
        return {key: value for entry in self.entries for key, value in entry.write(ours).items()}

    def _in_their_names(self, theirs: Theirs) -> Callable[[str], str]:
        """Return a function that names their key in a problem of a number of ours."""
        names = {path: key for key, path in self.numbers().items() if key in theirs}

        def renamed(problem: str) -> str:
            path, separator, rest = problem.partition(": ")
            return f"{names.get(path, path)}{separator}{rest}"

        return renamed

    def numbers(self) -> dict[str, str]:
        """Return the keys of theirs that are one number of ours, with its path."""
        return {key: path for entry in self.entries for key, path in entry.numbers.items()}

    def unread_keys(self, theirs: Theirs) -> list[str]:
        """Return the keys with a value that nothing here reads."""
        known = self.COMMON_KEYS | self.other_keys | set(self.write(self.template))
        known |= self.numbers().keys()
        return [key for key, value in theirs.items() if value and key not in known]


def field_of(config: Config, path: str) -> Any:
    """Return the field of a config at ``a.b.c``, or a mark where it has none."""
    found: Any = config
    for name in path.split("."):
        fields = found if isinstance(found, Mapping) else _fields(found)
        if name not in fields:
            return _ABSENT
        found = fields[name]
    return found


def _fields(config: Any) -> Mapping[str, Any]:
    names = type(config).model_fields if isinstance(config, Config) else ()
    return {name: getattr(config, name) for name in names}


def is_absent(value: object) -> bool:
    """Return whether ``field_of`` found nothing."""
    return value is _ABSENT


def differences(wanted: ModelConfig, found: ModelConfig) -> Iterator[str]:
    """Yield a sentence for each field that differs: what is wanted, and what is found."""
    theirs = _flat(found.to_dict())
    for path, value in _flat(wanted.to_dict()).items():
        other = theirs.get(path, _ABSENT)
        if other != value:
            shown = "no such field" if other is _ABSENT else show_value(other)
            yield f"model.{path} is {show_value(value)}, there {shown}"


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    inner = (_flat(value, f"{path}.{name}" if path else name) for name, value in tree.items())
    return {where: value for part in inner for where, value in part.items()}


def _set_field(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        tree = tree[name]
    tree[last] = value.to_dict() if isinstance(value, Config) else value
