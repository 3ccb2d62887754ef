"""MetricsSink: where rows of metrics go besides ``metrics.jsonl``."""

from moesaic.checkpoint.rundir import RunDir
from moesaic.core.config import Choice
from moesaic.observe.metrics import MetricWriter, TensorBoardWriter


class MetricsSink(Choice):
    """Family of optional sinks."""

    def open(self, run_dir: RunDir, *, step: int) -> MetricWriter:
        """Return the sink of a run that starts after ``step``. Raises UserError if it cannot."""
        raise NotImplementedError


class TensorBoard(MetricsSink):
    """Event files under the run directory; needs ``pip install "moesaic[tb]"``."""

    def open(self, run_dir: RunDir, *, step: int) -> MetricWriter:
        return TensorBoardWriter(run_dir.tensorboard, purge_after=step)
