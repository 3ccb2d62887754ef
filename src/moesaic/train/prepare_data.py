"""Text preparation: from a run's corpus to its tokenizer and token shards, made once by rank 0."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.trained_directions import (
    TrainedDirections,
    TrainedStream,
    read_trained_directions,
)
from moesaic.core.errors import ConfigError, did_you_mean
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.pair import Text
from moesaic.corpus.text_rules import write_text_rules
from moesaic.data.language_tag import SOURCE_TAG, TARGET_TAG
from moesaic.data.loader import DataReplica, Loader, LoaderConfig
from moesaic.data.mixture import Mixture, MixtureConfig
from moesaic.data.token_shard_writer import cached_shards
from moesaic.data.token_shards import TokenShards
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.tokenizer_source import TokenizerSource
from moesaic.data.vocabulary import ROLES
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.model.config import ModelConfig
from moesaic.train.corpus_source import CorpusSource
from moesaic.train.find_corpus import open_run_corpus
from moesaic.train.training_data import Preparation, PreparedData


@dataclass(frozen=True)
class CorpusSubset(Corpus):
    """The part of a corpus in some of its languages (sorted codes)."""

    selected: tuple[str, ...] = ()

    @classmethod
    def of(cls, corpus: Corpus, *, languages: Sequence[str]) -> "CorpusSubset":
        """Select ``languages`` in any spelling; empty means all. Raises ConfigError."""
        known = corpus.languages
        codes = [resolve_language(text).code for text in languages] or known
        missing = [code for code in codes if code not in known]
        if missing:
            raise ConfigError(
                f"data.languages: the corpus {corpus.name} has no {code}; it has "
                f"{', '.join(known)}{did_you_mean(code, known)}"
                for code in missing
            )
        return cls(corpus.path, corpus.manifest, tuple(sorted(set(codes))))

    @property
    def languages(self) -> tuple[str, ...]:
        return self.selected

    @property
    def directions(self) -> tuple[tuple[str, str], ...]:
        """Translation directions between selected languages."""
        selected = set(self.selected)
        return tuple(d for d in super().directions if selected.issuperset(d))

    @property
    def fingerprint(self) -> str:
        """Hash of the corpus and the selected languages."""
        text = " ".join((super().fingerprint, *self.selected))
        return hashlib.sha256(text.encode()).hexdigest()

    def iter_texts(self, code: str, *, split: str = "train") -> Iterator[Text]:
        """Yield the texts of a language, also from pairs with languages that are not selected."""
        return Corpus(self.path, self.manifest).iter_texts(code, split=split)


@dataclass(frozen=True, slots=True)
class EncodedCorpus:
    """Tokenizer, token shards, and which corpus they are of; the same on every rank."""

    tokenizer: Tokenizer
    shards: TokenShards
    corpus_name: str = ""
    corpus_fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class PreparedText(PreparedData):
    """An encoded corpus, and how batches are drawn from it."""

    encoded: EncodedCorpus
    mixture: MixtureConfig
    loader: LoaderConfig

    def facts(self) -> dict[str, str]:
        return {
            "fingerprint of the tokenizer": self.encoded.tokenizer.fingerprint,
            "fingerprint of the token shards": self.encoded.shards.fingerprint,
        }

    def require_fits(self, model: ModelConfig) -> None:
        """Raise ConfigError unless ids, tags and roles are there for this model and its tasks."""
        vocabulary, problems = self.encoded.tokenizer.vocabulary, list[str]()
        if vocabulary.size > model.vocab_size:
            has = f"the tokenizer has {vocabulary.size} ids, and every id"
            if vocabulary.id_map is not None:
                has = f"the tokenizer's id map has rows up to {vocabulary.size - 1}, and each"
            problems.append(
                f"model.vocab_size={model.vocab_size}: {has} needs a row of the embedding"
            )
        names = self.loader.collator.frame.names
        languages = self.encoded.tokenizer.languages
        without = [code for code in languages if code not in vocabulary.tags]
        if without and {SOURCE_TAG, TARGET_TAG} & set(names):
            problems.append(
                f"the tokenizer has no tag for {', '.join(without)}: add them "
                f"(data.tokenizer.added_tags=[{', '.join(without)}]), name their tokens in "
                "data.tokenizer.tags, or choose data.loader.collator.tag=NoTag"
            )
        needed = dict.fromkeys(set(names) & set(ROLES), "data.loader.collator.tag")
        for weighted in self.mixture.tasks:
            needed |= dict.fromkeys(weighted.task.roles, f"the task {weighted.task.name}")
        problems += [
            f"the tokenizer has no {name} token, which {what} needs: name one of its tokens as "
            f"data.tokenizer.{name}"
            for name, what in sorted(needed.items())
            if name not in vocabulary.roles
        ]
        if problems:
            raise ConfigError(problems)

    def make_loader(self, replica: DataReplica, *, seed: int) -> Loader:
        return Loader(
            self.encoded.shards,
            tokenizer=self.encoded.tokenizer,
            mixture=self.mixture,
            config=self.loader,
            seed=seed,
            replica=replica,
        )

    def record(self, run_dir: RunDir, *, seed: int) -> None:
        """Write ``directions.json``: the streams of the mixture.

        Streams that are recorded there already, of the run that this one started from, are kept.
        """
        record = trained_directions(self.encoded, mixture=self.mixture, seed=seed)
        if earlier := read_trained_directions(run_dir.directions):
            record = record.with_earlier(earlier)
        record.write(run_dir.directions)

    def validation_notes(self, run_dir: RunDir) -> list[str]:
        record = read_trained_directions(run_dir.directions)
        if record is None or record.valid_rows:
            return []
        return [
            "the validation split has no rows for these tasks: there will be no validation loss "
            "and no best checkpoint (the split is by a hash of the source; more text fills it)"
        ]


def prepare_data(
    place: Preparation,
    *,
    corpus: CorpusSource,
    languages: Sequence[str],
    tokenizer: TokenizerSource,
) -> EncodedCorpus:
    """Build or open the corpus, then the run directory's tokenizer, then the cached shards.

    Rank 0 does the work. Collective. Raises DataError or ConfigError.
    """
    run_dir = place.run_dir

    def work() -> dict[str, str]:
        place.notify("opening the corpus")
        whole = open_run_corpus(corpus, run_dir=run_dir, progress=place.notify)
        chosen = CorpusSubset.of(whole, languages=languages)
        for sentence in chosen.describe_empty_splits():
            place.notify(sentence)
        write_text_rules(run_dir.text_rules, chosen.text_rules)
        made = _load_or_train_tokenizer(place, config=tokenizer, corpus=chosen)
        place.notify("opening the token shards (they are written the first time)")
        shards = cached_shards(chosen, tokenizer=made, progress=place.notify).path
        return {"shards": str(shards), "corpus": whole.name, "fingerprint": whole.fingerprint}

    made = run_on_rank0(place.world, work)
    return EncodedCorpus(
        Tokenizer.load(run_dir.tokenizer),
        TokenShards.open(Path(made["shards"])),
        corpus_name=made["corpus"],
        corpus_fingerprint=made["fingerprint"],
    )


def trained_directions(
    encoded: EncodedCorpus, *, mixture: MixtureConfig, seed: int
) -> TrainedDirections:
    """Return the streams that a mixture draws from."""
    shards, languages = encoded.shards, encoded.tokenizer.languages
    mixed = Mixture(mixture, shards=shards, languages=languages, seed=seed)
    held_out: dict[tuple[str, ...], int] = {}
    for name, task in zip(mixed.task_names, mixed.tasks, strict=True):
        for split in ("valid", "test"):
            for stream in task.streams(shards, languages=languages, split=split):
                ends = stream.source_language, stream.target_language
                held_out[split, name, *ends, stream.domain] = stream.size
    return TrainedDirections(
        corpus=encoded.corpus_name,
        fingerprint=encoded.corpus_fingerprint,
        streams=tuple(
            TrainedStream(
                task=row.task,
                source=row.source_language,
                target=row.target_language,
                rows=row.size,
                valid_rows=held_out.get(("valid", *key), 0),
                test_rows=held_out.get(("test", *key), 0),
                share=round(row.expected, 6),
                domain=row.domain,
            )
            for row in mixed.frequencies(mixed.initial_counts())
            for key in [(row.task, row.source_language, row.target_language, row.domain)]
        ),
    )


def _load_or_train_tokenizer(
    place: Preparation, *, config: TokenizerSource, corpus: CorpusSubset
) -> Tokenizer:
    path = place.run_dir.tokenizer
    if path.is_file():
        tokenizer = Tokenizer.load(path)
        _check_tokenizer(tokenizer, config=config, corpus=corpus, place=place)
        return tokenizer
    texts = {
        code: (
            line
            for text in corpus.iter_texts(code, split="train")
            for line in text.text.splitlines(keepends=True)  # a document is no unit of a sample
        )
        for code in corpus.languages
    }
    tokenizer = config.make(texts, languages=corpus.languages, notify=place.notify)
    tokenizer.save(path)
    return tokenizer


def _check_tokenizer(
    tokenizer: Tokenizer, *, config: TokenizerSource, corpus: CorpusSubset, place: Preparation
) -> None:
    problems, path = [], place.run_dir.tokenizer
    expected = config.size()
    if expected is not None and tokenizer.vocab_size != expected:
        problems.append(
            f"data.tokenizer.vocab_size: {path} has {tokenizer.vocab_size} ids, the run config has "
            f"{expected}; remove the file to train another"
        )
    missing = [code for code in corpus.languages if code not in tokenizer.languages]
    if missing:
        problems.append(
            f"data.languages: {path} has no tag for {', '.join(missing)}, but for "
            f"{', '.join(tokenizer.languages)}; {place.way_out}"
        )
    if problems:
        raise ConfigError(problems)
