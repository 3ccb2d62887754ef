"""Model card: what the weights of a directory are and what they were trained on.

YAML front matter as on the Hugging Face Hub (huggingface.co/docs/hub/model-cards), then tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.files import atomic_write
from moesaic.core.markdown import markdown_table
from moesaic.core.units import show_count
from moesaic.model.config import ModelConfig
from moesaic.model.head import LanguageModelHead
from moesaic.model.parameter_flop_count import count_parameters

MAX_SOURCES = 30  # listed by name


@dataclass(frozen=True, slots=True)
class DataSource:
    """One source of training text."""

    name: str
    licence: str
    rows: int


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The content of a model card.

    ``languages`` are BCP-47 codes. ``licence`` is an SPDX identifier. ``parameters`` maps a part's
    name to (total, active per token). ``scores`` are rows of a table: language and metrics.
    ``notes`` are the limitations.
    """

    name: str
    languages: Sequence[str]
    licence: str
    task: str
    parameters: Mapping[str, tuple[int, int]]
    sources: Sequence[DataSource] = ()
    scores: Sequence[Mapping[str, str | float]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Return the card as Markdown with YAML front matter."""
        parts = [self._front_matter(), f"# {self.name}\n", self._model()]
        if self.sources:
            parts.append("## Training data\n\n" + _source_table(self.sources))
        if self.scores:
            parts.append("## Scores\n\n" + _record_table(self.scores))
        if self.notes:
            parts.append("## Limits\n\n" + "".join(f"- {note}\n" for note in self.notes))
        return "\n".join(parts)

    def _front_matter(self) -> str:
        fields = {
            "language": list(self.languages),
            "license": self.licence.lower(),
            "library_name": "moesaic",
            "pipeline_tag": self.task,
            "tags": ["moe", "mixture-of-experts", "multilingual"],
            "datasets": [s.name for s in _by_rows(self.sources)[:MAX_SOURCES]],
        }
        kept = {key: value for key, value in fields.items() if value}
        return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---\n"

    def _model(self) -> str:
        rows = [
            (name, show_count(total), show_count(active))
            for name, (total, active) in self.parameters.items()
        ]
        total, active = (sum(v[i] for v in self.parameters.values()) for i in (0, 1))
        rows.append(("**all**", f"**{show_count(total)}**", f"**{show_count(active)}**"))
        facts = "".join(f"- {name}: {value}\n" for name, value in self.facts.items())
        table = markdown_table(("part", "parameters", "active per token"), rows)
        return "## Model\n\n" + table + (f"\n{facts}" if facts else "")


def add_to_card(model: Path, name: str, text: str) -> None:
    """Add a fact to the card of a model directory, if it has one: the last one of its model."""
    card = RunDir(model).card
    if card.is_file():
        known = card.read_text(encoding="utf-8")
        begin = known.find("\n## ", known.find("## Model\n"))
        parts = (known, "") if begin < 0 else (known[:begin], known[begin:])
        atomic_write(card, f"{parts[0].rstrip()}\n- {name}: {text}\n{parts[1]}")


def card_task(model: ModelConfig) -> str:
    """Return the Hub's name of what a model does: empty for a head other than a vocabulary's."""
    if not isinstance(model.head, LanguageModelHead):
        return ""
    return "translation" if model.encoder.layers else "text-generation"


def card_parameters(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the parameters of each part of a model, all and those that a token uses."""
    parts: dict[str, tuple[int, int]] = {}
    for entry in count_parameters(model).entries:
        total, active = parts.get(entry.part, (0, 0))
        parts[entry.part] = (total + entry.size, active + round(entry.size * entry.active_fraction))
    return parts


def _by_rows(sources: Sequence[DataSource]) -> list[DataSource]:
    return sorted(sources, key=lambda source: -source.rows)


def _source_table(sources: Sequence[DataSource]) -> str:
    """Return the largest sources, and the others of each licence together."""
    largest, others = _by_rows(sources)[:MAX_SOURCES], _by_rows(sources)[MAX_SOURCES:]
    rows = [(s.name, s.licence, f"{s.rows:,}") for s in largest]
    for licence in dict.fromkeys(source.licence for source in others):
        of_it = [source.rows for source in others if source.licence == licence]
        rows.append((f"{len(of_it)} smaller ones", licence, f"{sum(of_it):,}"))
    return markdown_table(("source", "licence", "rows"), rows)


def _record_table(records: Sequence[Mapping[str, str | float]]) -> str:
    head = list(dict.fromkeys(name for record in records for name in record))
    return markdown_table(head, [[record.get(name, "") for name in head] for record in records])
