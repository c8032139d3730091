"""The suggested experiment: a pyramid and everything else that it takes to train and predict with it.

The training settings are those that proved themselves for data sets of a few hundred to a few thousand images on one
device; only what depends on the pyramid and the number of chips is computed.
"""

import math

import numpy as np

from sniper.config.experiment import ExperimentSpec, TrainSpec
from sniper.data.spec import DataSpec
from sniper.models.spec import BackboneSpec, DetectorSpec, RoIHeadSpec, RPNSpec
from sniper.planning.cost import CostPlan

_BATCH_SIDE = 16 * 256  # chips in a batch times their side, pixels; as many as a CPU with 8 GB can train on
_MIN_STEPS, _EPOCHS = 1_500, (12, 50)  # epochs: of a large set; at most, of a small one
_WARMUP_SHARE, _MAX_WARMUP = 0.05, 500
_MILESTONES = (0.75, 0.92)  # shares of the epochs
_ANCHOR_QUANTILES = (0.05, 0.95)  # of the box sizes in the chips


def suggest_experiment(
    cost: CostPlan, *, data: DataSpec, is_scored: bool = False, batch_size: int | None = None
) -> ExperimentSpec:
    """Return an experiment that trains on the chips of a plan and predicts at the same levels.

    Args:
        cost: the plan of the training set.
        data: the data sets, and how they are read.
        is_scored: whether there are test images, to score on while it trains.
        batch_size: chips per step; None chooses by the chip size.
    """
    batch_size = batch_size or 2 ** round(math.log2(max(_BATCH_SIDE / cost.pyramid.chip_size, 1)))
    steps = max(cost.num_steps(batch_size), 1)
    fewest, most = _EPOCHS
    epochs = min(max(math.ceil(_MIN_STEPS / steps), fewest), most)
    return ExperimentSpec(
        data=data,
        model=DetectorSpec(
            backbone=BackboneSpec(name="mobilenetv2_100"),
            rpn=RPNSpec(
                channels=128, anchor_sizes=fit_anchors(cost), pre_nms_top_n=1000, post_nms_top_n_train=128
            ),
            roi_head=RoIHeadSpec(channels=64, hidden_dim=512),
        ),
        train=TrainSpec(
            epochs=epochs,
            batch_size=batch_size,
            reference_batch_size=batch_size,
            optimizer="adamw",
            learning_rate=0.0005,
            weight_decay=0.01,
            warmup_steps=min(round(_WARMUP_SHARE * epochs * steps), _MAX_WARMUP),
            warmup_start_factor=0.1,
            milestones=tuple(round(share * epochs, 1) for share in _MILESTONES),
            clip_grad_norm=10.0,
            evaluate_every=max(epochs // 4, 1) if is_scored else None,
        ),
    ).with_pyramid(cost.pyramid, train=data.train)


def fit_anchors(cost: CostPlan) -> tuple[float, ...]:
    """Return anchor sizes for the boxes of a plan: powers of 2 around nearly all of their sizes in the chips.

    A box between two of them has an IoU of at least 0.5 with one, if it has its aspect ratio and position.
    """
    sizes = np.concatenate([level.sizes for level in cost.levels])
    if not len(sizes):
        return RPNSpec().anchor_sizes
    low, high = np.log2(np.quantile(sizes, _ANCHOR_QUANTILES)).tolist()
    first, last = math.floor(low + 0.5), math.floor(high + 0.5)
    last = min(last, math.floor(math.log2(cost.pyramid.chip_size)))
    return tuple(2.0**power for power in range(min(first, last), last + 1))
