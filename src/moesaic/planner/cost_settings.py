"""Cost settings: what the cost of a training step depends on."""

import torch
from pydantic import Field

from moesaic.core.config import Config
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.ops.chunk_sizes import ChunkSizes, chunk_sizes
from moesaic.optim.optimizer import AdamW, Optimizer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.precision import Float32, Precision
from moesaic.parallel.trainable_parameters import AllParameters, TrainableParameters


class CostSettings(Config):
    """What the cost of a step depends on.

    ``sizes`` are those of one micro-batch of a data-parallel rank, ``world`` the number of ranks.
    ``busiest_share`` is the share of a layer's edges that expert 0 has, which rank 0 holds; None is
    even. Kernels divide large results as on a ``device`` of this type. What is not ``trainable``
    has no gradients and no states; adapters of the choice are in the model.
    """

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: Precision = Float32()
    optimizer: Optimizer = AdamW()
    sizes: BatchDims
    micro_batches: int = Field(default=1, ge=1)
    world: int = Field(default=1, ge=1)
    busiest_share: float | None = Field(default=None, gt=0, le=1)
    device: str = "cuda"
    trainable: TrainableParameters = AllParameters()

    @property
    def chunks(self) -> ChunkSizes:
        """The sizes of those parts."""
        return chunk_sizes(torch.device(self.device))
