"""Row data: training data of rows that are computed from their numbers (series, images)."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import Field

from moesaic.checkpoint.model_card import DataSource
from moesaic.checkpoint.run_directory import RunDir
from moesaic.data import images as images  # registers a RowSource
from moesaic.data import series_rows as series_rows  # registers a RowSource
from moesaic.data.batch_stream import DataReplica
from moesaic.data.row_loader import RowDataset, RowLoader, RowSource
from moesaic.distributed.rank0 import run_on_rank0
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.train.training_data import Preparation, PreparedData, TrainingData


class RowData(TrainingData):
    """Rows of a ``source``; a micro-batch has ``batch_rows`` of them over all ranks together."""

    source: RowSource
    batch_rows: int = Field(default=32, ge=1)

    def task_names(self) -> tuple[str, ...]:
        return ()

    def batch_dims(self, model: ModelConfig) -> BatchDims:
        del model
        return BatchDims(rows=self.batch_rows, source=0, target=self.source.positions)

    def max_batch_tokens(self) -> int:
        return self.batch_rows * self.source.positions

    def prepare(self, place: Preparation) -> "PreparedRows":
        """Download what is needed on rank 0, then read it on every rank. Collective."""

        def work() -> str:
            return self.source.open(place.notify).fingerprint

        run_on_rank0(place.world, work)
        return PreparedRows(self.source.open(lambda _: None), self.batch_rows)

    def sources(self, run_dir: RunDir) -> list[DataSource]:
        del run_dir
        origins = self.source.open(lambda _: None).origins
        return [DataSource(origin.name, origin.licence, origin.size) for origin in origins]

    def problems(self, model: ModelConfig) -> Iterator[str]:
        if model.encoder.layers:
            yield (
                f"data=RowData leaves model.encoder.layers={model.encoder.layers} without input: "
                "set them to 0"
            )


@dataclass(frozen=True, slots=True)
class PreparedRows(PreparedData):
    """A data set that was read, and the rows of a batch."""

    dataset: RowDataset
    rows: int

    def facts(self) -> dict[str, str]:
        return {"fingerprint of the rows": self.dataset.fingerprint}

    def make_loader(self, replica: DataReplica, *, seed: int) -> RowLoader:
        return RowLoader(self.dataset, rows=self.rows, seed=seed, replica=replica)
