"""DiT-MoE: a diffusion transformer with experts on small images, and its dense control.

After DiT-MoE (2407.11633): top-2 of softmax weights that are not normalised again, two shared
experts, rectified flow. Time and class are added to the patches; the paper's adaptive norms are not
here.
"""

from moesaic.data.images import ImagePatches
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.decoder_mask import FullMask
from moesaic.model.inputs import Patches
from moesaic.model.value_heads import PatchDenoising
from moesaic.moe.auxiliary_losses import SwitchBalance
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.shared_experts import SharedExperts
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.nn.positional_encoding import LearnedPositions
from moesaic.optim.lr_schedule import WSD, LinearDecay
from moesaic.optim.optimizer import AdamW
from moesaic.train.row_data import RowData
from moesaic.train.run import CheckpointConfig, LogConfig, Run, ValidationConfig

WIDTH = 64  # of an expert; a patch uses four
CHANNELS, CLASSES = 4, 10


def dit_moe() -> Run:
    """Digits of 8 x 8 points as 16 patches, 8 experts: two minutes on two CPU cores."""
    return Run(
        name="dit-moe",
        data=RowData(source=ImagePatches(patch=2), batch_rows=64),
        model=ModelConfig(
            dim=64,
            input=Patches(channels=CHANNELS, classes=CLASSES),
            head=PatchDenoising(channels=CHANNELS, classes=CLASSES),
            encoder=Stack(layers=0),
            decoder=Stack(layers=3, moe_every=1),
            decoder_mask=FullMask(),
            position=LearnedPositions(max_length=16),
            attention=AttentionConfig(heads=4),
            feed_forward=FeedForwardConfig(hidden=WIDTH, activation=SwiGLU()),
            moe=MoE(
                experts=8,
                select=TopK(k=2, normalise="none"),
                balance=(SwitchBalance(weight=0.01),),
                shared_experts=SharedExperts(number=2),
            ),
        ),
        optimizer=AdamW(lr=3e-3, weight_decay=0.01),
        schedule=WSD(warmup=0.05, decay=0.95, shape=LinearDecay()),
        steps=600,
        checkpoint=CheckpointConfig(every=150, keep=1),
        validation=ValidationConfig(every=150, rows=32),
        log=LogConfig(every=20),
    )


def dit_moe_dense() -> Run:
    """The dense control of ``dit-moe``: as many parameters as a patch uses there."""
    run = dit_moe()
    dense = run.model.replace(
        moe=NoMoE(), feed_forward=run.model.feed_forward.replace(hidden=4 * WIDTH)
    )
    return run.replace(name="dit-moe-dense", model=dense)
