"""Time-MoE: a forecaster with several horizons on series of six domains, and its dense control.

After Time-MoE (2409.16040): a gated embedding of each point, experts of half a feed-forward's width
of which a point uses two, a gated shared expert, heads for several horizons, Huber loss.
"""

from moesaic.data.series_rows import SeriesRows
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.inputs import PointValues
from moesaic.model.value_heads import Regression
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.shared_experts import GatedSharedExperts
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.optim.lr_schedule import WSD, LinearDecay
from moesaic.optim.optimizer import AdamW
from moesaic.train.row_data import RowData
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig

WIDTH = 144  # of the feed-forwards that a point uses, together


def time_moe() -> Run:
    """Series of six domains, three horizons, 8 experts: two minutes on two CPU cores."""
    return Run(
        name="time-moe",
        data=RowData(source=SeriesRows(context=64, future=32), batch_rows=32),
        model=ModelConfig(
            dim=48,
            input=PointValues(),
            head=Regression(horizons=(1, 8, 32)),
            encoder=Stack(layers=0),
            decoder=Stack(layers=3, moe_every=1),
            attention=AttentionConfig(heads=4),
            feed_forward=FeedForwardConfig(hidden=WIDTH // 3, activation=SwiGLU()),
            moe=MoE(
                experts=8,
                select=TopK(k=2, normalise="none"),
                balance=(SwitchBalance(weight=0.02),),
                shared_experts=GatedSharedExperts(),
            ),
        ),
        optimizer=AdamW(lr=3e-3, weight_decay=0.01),
        schedule=WSD(warmup=0.05, decay=0.95, shape=LinearDecay()),
        steps=400,
        checkpoint=CheckpointConfig(every=100, keep=1),
        validation=ValidationConfig(every=100, rows=8),
        log=LogConfig(every=20),
    )


def time_moe_dense() -> Run:
    """The dense control of ``time-moe``: as many parameters as a point uses there."""
    run = time_moe()
    dense = run.model.replace(
        moe=NoMoE(), feed_forward=run.model.feed_forward.replace(hidden=WIDTH)
    )
    return run.replace(name="time-moe-dense", model=dense)
