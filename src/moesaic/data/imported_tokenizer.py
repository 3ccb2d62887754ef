"""Imported tokenizers: any ``tokenizer.json`` of Hugging Face and any SentencePiece ``.model``.

The roles of tokens are found beside the file (``tokenizer_config.json``,
``special_tokens_map.json``), in the model, or by the usual names of tokens; or they are given.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from tokenizers import AddedToken
from tokenizers import Tokenizer as HfTokenizer

from moesaic.core.errors import DataError, did_you_mean
from moesaic.core.file_reader import MIB, FileKind, FileShape
from moesaic.corpus.languages import find_language
from moesaic.data.id_map import IdMap, SameIds
from moesaic.data.sentencepiece_file import build_sentencepiece, read_sentencepiece
from moesaic.data.tokenizer import Tokenizer, language_token
from moesaic.data.tokenizer_file import import_tokenizer_file
from moesaic.data.tokenizer_source import TokenizerSource
from moesaic.data.vocabulary import ROLES, Vocabulary
from moesaic.data.vocabulary_file import RecordedVocabulary

TOKEN_NAMES_FILE = FileKind(name="file of special tokens", max_bytes=64 * MIB, error=DataError)
NEIGHBOURS = ("special_tokens_map.json", "tokenizer_config.json")
USUAL_NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "bos": ("<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "[SEP]", "<|endoftext|>", "<|end_of_text|>"),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
    "mask": ("<mask>", "[MASK]", "<|mask|>"),
}


class _TokenNamesShape(FileShape):
    kind: ClassVar[FileKind] = TOKEN_NAMES_FILE
    pad_token: Any = None
    bos_token: Any = None
    eos_token: Any = None
    unk_token: Any = None
    mask_token: Any = None


class FromFile(TokenizerSource):
    """The tokenizer of another model: a tokenizer.json, a .model, or a folder with one of them.

    A role that is not given is found in the files or by its usual name. A language has the tag that
    ``tags`` says, or one of a usual form: ``deu_Latn``, ``<deu_Latn>``, ``__de__``, ``de_DE``,
    ``<2de>``. The model may have more rows than the tokenizer has ids, never fewer; ``id_map`` says
    which row is whose.
    """

    path: str
    pad: str | None = None
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    mask: str | None = None
    tags: dict[str, str] = Field(default_factory=dict)
    """Code of a language or task -> token."""

    id_map: IdMap = SameIds()
    """Order of the model's rows, if it is not that of the ids."""

    def make(
        self,
        texts: Mapping[str, Iterable[str]],
        *,
        languages: Sequence[str],
        notify: Callable[[str], None],
    ) -> Tokenizer:
        del texts
        path = _file_of(Path(self.path))
        if path.suffix == ".model":
            model = read_sentencepiece(path)
            hf_tokenizer, declared = build_sentencepiece(model), model.roles
        else:
            hf_tokenizer, notes = import_tokenizer_file(path)
            declared = {}
            for note in notes:
                notify(note)
        in_file = max(hf_tokenizer.get_vocab().values(), default=-1) + 1
        roles = self._roles(hf_tokenizer, declared | _declared_beside(path), path=path)
        tags = self._tags(hf_tokenizer, languages, path=path)
        names = dict.fromkeys((*roles.values(), *tags.values()))
        hf_tokenizer.add_special_tokens(
            [AddedToken(name, special=True, normalized=False) for name in names]
        )
        hf_tokenizer = _as_read_back(hf_tokenizer)
        known = hf_tokenizer.get_vocab()
        rows = self.id_map.rows(known, roles, in_file=in_file)
        ids = known if rows is None else {name: rows[index] for name, index in known.items()}
        of_roles = {role: ids[name] for role, name in roles.items()} | self.id_map.roles()
        vocabulary = Vocabulary.of_roles(
            max((*ids.values(), *(rows or ()), *of_roles.values())) + 1,
            of_roles,
            tags={code: ids[name] for code, name in tags.items()},
            id_map=rows,
        )
        return Tokenizer(hf_tokenizer, recorded=RecordedVocabulary(vocabulary, tuple(languages)))

    def size(self) -> None:
        return None

    def _roles(
        self, hf_tokenizer: HfTokenizer, declared: Mapping[str, str], *, path: Path
    ) -> dict[str, str]:
        """Return the token of each role that there is. Raises DataError: no end, or two."""
        known, found = hf_tokenizer.get_vocab(), {}
        for role in ROLES:
            given = getattr(self, role)
            if given is not None and given not in known:
                raise DataError(
                    f"data.tokenizer.{role}: {path} has no token {given!r:.60}"
                    f"{did_you_mean(given, list(known))}"
                )
            usual = [name for name in USUAL_NAMES[role] if name in known]
            if given or declared.get(role) in known:
                found[role] = given or declared[role]
            elif len(usual) == 1:
                found[role] = usual[0]
            elif role == "eos":
                several = f"several tokens may be the end of a text ({', '.join(usual)})"
                why = several if usual else "no token is known to be the end of a text"
                raise DataError(f"{path}: {why}: name it as data.tokenizer.eos=TOKEN")
        return found

    def _tags(
        self, hf_tokenizer: HfTokenizer, languages: Sequence[str], *, path: Path
    ) -> dict[str, str]:
        """Return the tokens of languages and tasks by code, those to be added included."""
        known, found = hf_tokenizer.get_vocab(), dict(self.tags)
        for code, name in found.items():
            if name not in known:
                raise DataError(f"data.tokenizer.tags: {path} has no token {name!r:.60} ({code})")
        for code in languages:
            names = [name for name in _usual_tags(code) if name in known]
            if code not in found and names:
                found[code] = names[0]
        for code in self.added_tags:
            if code in found or language_token(code) in known:
                raise DataError(f"data.tokenizer.added_tags: {path} has a tag for {code} already")
            found[code] = language_token(code)
        return found


def _as_read_back(hf_tokenizer: HfTokenizer) -> HfTokenizer:
    """Return a tokenizer as its file gives it: the library reads a score back with other bits."""
    text = hf_tokenizer.to_str()
    while (again := HfTokenizer.from_str(text)).to_str() != text:
        text = again.to_str()
    return again


def _file_of(path: Path) -> Path:
    """Return the tokenizer file that a path names. Raises DataError."""
    if path.is_dir():
        files = [path / "tokenizer.json", *sorted(path.glob("*.model"))]
        found = [file for file in files if file.is_file()]
        if not found:
            raise DataError(f"{path}: found neither a tokenizer.json nor a .model in this folder")
        return found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a tokenizer.json or a .model")
    return path


def _declared_beside(path: Path) -> dict[str, str]:
    """Return the tokens of roles that the files beside a tokenizer name."""
    found: dict[str, str] = {}
    for name in NEIGHBOURS:
        file = path.with_name(name)
        if not file.is_file():
            continue
        shape = _TokenNamesShape.read(file)
        for role in ROLES:
            token = getattr(shape, f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[role] = token
    return found


def _usual_tags(code: str) -> tuple[str, ...]:
    """Return the forms of a language's tag: of NLLB and ours, M2M-100, mBART, MADLAD-400."""
    language = find_language(code)
    names = (code, language_token(code))
    short = language.iso1 if language else None
    if language is None or short is None:
        return names
    regions = [f"{short}_{alias.rpartition('-')[2]}" for alias in language.aliases if "-" in alias]
    return (*names, f"__{short}__", *regions, f"{short}_{short.upper()}", f"<2{short}>")
