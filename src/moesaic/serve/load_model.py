"""Load a model directory for Python: one object that translates, generates, scores, gives logits.

Letters: B rows, T and S tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.manifest import MANIFEST_FILE
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import (
    copy_beside_weights,
    weights_metadata,
    write_run_record,
)
from moesaic.checkpoint.safetensors_io import write_tensors
from moesaic.core.errors import CheckpointError, DataError
from moesaic.core.files import copy_files, new_directory
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.core.yaml_reader import read_yaml_file
from moesaic.corpus.languages import UNDETERMINED
from moesaic.corpus.pair import Text
from moesaic.data.batch import Batch, InputRows
from moesaic.data.tokenizer import Tokenizer
from moesaic.model.transformer import Transformer
from moesaic.model.weights import export_weights
from moesaic.serve.document_loss import document_losses, row_losses
from moesaic.serve.open_run import OpenedRun, open_run, open_weights_alone
from moesaic.serve.text_generator import TextGenerator
from moesaic.serve.translator import Translator


def load(path: Path | str, *, device: str = "cpu") -> "LoadedModel":
    """Load the model of a directory: a finished run, an imported model, or a checkpoint of a run.

    Raises CheckpointError naming what is missing, does not fit, or is not finite.
    """
    directory, weights = Path(path), None
    if (directory / MANIFEST_FILE).is_file():  # RUN/checkpoints/step-20
        directory, weights = directory.resolve().parents[1], directory
    elif (directory / "config.json").is_file() and not RunDir(directory).config.is_file():
        raise CheckpointError(
            f"{directory}: a model of Hugging Face transformers, expected one of ours; make it "
            f"one: moesaic import {directory} --out MODEL"
        )
    run = RunDir.open(directory)
    if run.tokenizer.is_file():
        text = open_run(directory, weights=weights, device=device)
        return LoadedModel(run, text.model, text)
    return LoadedModel(run, open_weights_alone(run, weights=weights, device=device), None)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory: ``model`` is an ordinary module, in evaluation mode.

    ``text`` is what its texts need (tokenizer, limits, rules); None for a model without tokenizer,
    which has logits alone.
    """

    run: RunDir
    model: Transformer
    text: OpenedRun | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises DataError if there is none."""
        return self._text().tokenizer

    def translate(self, texts: str | Sequence[str], *, source: str, target: str, **how: Any) -> Any:
        """Translate a text, or each of several: ``Translator.translate`` has the details."""
        translator = Translator.of(self._text())
        return translator.translate(texts, source=source, target=target, **how)

    def generate(self, prompts: str | Sequence[str], **how: Any) -> Any:
        """Continue a prompt, or each of several: ``TextGenerator.generate`` has the details."""
        return TextGenerator.of(self._text()).generate(prompts, **how)

    @torch.inference_mode()
    def score(
        self,
        texts: Sequence[str],
        *,
        sources: Sequence[str] | None = None,
        direction: tuple[str, str] | None = None,
    ) -> list[float]:
        """Return the log-probability of each text, its end included, in nats.

        Of a decoder these are texts on their own, in windows as long as its training rows. With an
        encoder they are translations of ``sources`` in a ``direction`` (source, target).

        Raises DataError for an empty text, or if sources are needed or cannot be read.
        """
        if not self.model.config.encoder.layers:
            return self._score_documents(texts)
        if sources is None or direction is None or len(sources) != len(texts):
            raise DataError("a model with an encoder scores texts given sources and a direction")
        source, target = direction
        batch = Translator.of(self._text()).batch(
            sources, targets=texts, source=source, target=target
        )
        return [-loss for loss in row_losses(self.model, batch)]

    def logits(
        self, ids: Int[Tensor, "B T"], *, source: Int[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B T V"]:
        """Return the scores of the token after each one of ``ids``, with a graph as any module.

        ``source`` is what an encoder reads. Rows have no padding; every token is read as it is.
        """
        zeros = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        empty = InputRows.empty(len(ids), device=ids.device)
        inputs = empty if source is None else InputRows.full(source)
        batch = Batch(inputs, InputRows.full(ids), ids, {}, zeros)
        return self.model.predict(self.model(batch).hidden).view(*ids.shape, -1)

    def save(self, out: Path | str) -> None:
        """Write the model as it is now as a new directory, which export and ``load`` read.

        Raises FileError if it exists.
        """
        with new_directory(Path(out)) as path:
            new = RunDir(path)
            plugins = copy_beside_weights(self.run, to=new)
            copy_files([self.run.config, self.run.card], to=path)
            metadata = weights_metadata(new, model=self.model.config.to_dict())
            write_tensors(new.model, tensors=export_weights(self.model), metadata=metadata)
            config = read_yaml_file(new.config)
            assert isinstance(config, dict)
            write_run_record(new, config=config, plugins=plugins)

    def _score_documents(self, texts: Sequence[str]) -> list[float]:
        generator = TextGenerator.of(self._text())
        rows = [Text(text, UNDETERMINED) for text in texts]
        window = generator.window
        found = document_losses(generator, rows, window=window, stride=max(1, window // 2))
        if len(found) != len(rows):
            raise DataError("a text is empty, expected at least one visible character in each")
        return [-loss.nll for loss in found]

    def _text(self) -> OpenedRun:
        if self.text is None:
            raise DataError(f"{self.run.path}: no tokenizer.json: the model reads ids (`logits`)")
        return self.text
