"""The suggested experiment: a pyramid and everything else that it takes to train and predict with it.

The training settings are those that proved themselves for data sets of a few hundred to a few thousand images on one
device; only what depends on the pyramid and the number of chips is computed.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from sniper.chips.negatives import NegativeSpec
from sniper.config.experiment import ExperimentSpec, MineSpec, PredictSpec, TrainSpec
from sniper.data.spec import DataSpec
from sniper.models.spec import BackboneSpec, DetectorSpec, MaskHeadSpec, RoIHeadSpec, RPNSpec
from sniper.planning.cost import CostPlan
from sniper.training.pace import SEARCH_SHARE

CPU_BACKBONE, GPU_BACKBONE = "mobilenetv2_100", "resnet50"
"""The backbones: one that is small enough to train on a CPU, and the usual one."""

_BATCH_SIDES = {False: 16 * 256, True: 16 * 512}
"""Chips in a batch times their side, pixels, by whether it is for a GPU: what 8 GB hold, and the paper's batch."""

_MIN_BATCH_SIZE = 8
_MIN_STEPS, _EPOCHS = 1_500, (12, 50)  # epochs: of a large set; at most, of a small one
_WARMUP_SHARE, _MAX_WARMUP = 0.05, 500
_NUM_EVALUATIONS = 4  # while it trains
_MILESTONES = (0.75, 0.92)  # shares of the epochs
_FEWEST_MINED_EPOCHS = 5
_MINING_SHARE = 0.1  # of the time of training
_CPU_CHANNELS, _CPU_CONVS = 64, 2  # of the heads of torchvision's detectors
_ANCHOR_QUANTILES = (0.05, 0.95)  # of the box sizes in the chips


def suggest_experiment(
    cost: CostPlan,
    *,
    data: DataSpec,
    is_scored: bool = False,
    batch_size: int | None = None,
    epochs: float | None = None,
    optimizer: Literal["sgd", "adamw"] = "adamw",
    neck: Literal["concat", "fpn"] = "fpn",
    model: DetectorSpec | None = None,
    on_gpu: bool = False,
    has_masks: bool = False,
) -> ExperimentSpec:
    """Return an experiment that trains on the chips of a plan and predicts at the same levels.

    Args:
        cost: the plan of the training set.
        data: the data sets, and how they are read.
        is_scored: whether there are test images, to score on while it trains.
        batch_size: chips per step; None chooses by chip size, device and number of chips.
        epochs: to train for; None chooses by the number of chips.
        optimizer: with the learning rate and weight decay that go with it.
        neck: of the backbone; with a feature pyramid each of its maps has anchors of one size.
        model: the detector, of which the kind and the name are kept; None is that of this package.
        on_gpu: whether to train on a GPU, with a larger network and batch.
        has_masks: whether the training set has masks, which a mask head then learns.
    """
    batch_size = batch_size or suggest_batch_size(cost, on_gpu=on_gpu)
    steps = max(cost.num_steps(batch_size), 1)
    if epochs is None:
        fewest, most = _EPOCHS
        epochs = min(max(math.ceil(_MIN_STEPS / steps), fewest), most)
    has_chips = data.whole is None and data.tiles is None
    negatives, mine = suggest_negatives(cost, epochs=epochs) if has_chips else (NegativeSpec(), MineSpec())
    return ExperimentSpec(
        data=data,
        negatives=negatives,
        mine=mine,
        model=with_mask_head(
            _suggest_model(cost, model=model, neck=neck, on_gpu=on_gpu), has_masks=has_masks, on_gpu=on_gpu
        ),
        train=TrainSpec(
            epochs=epochs,
            batch_size=batch_size,
            warmup_steps=min(math.floor(_WARMUP_SHARE * epochs * steps), _MAX_WARMUP),
            milestones=tuple(round(share * epochs, 1 if epochs >= 10 else 3) for share in _MILESTONES),
            clip_grad_norm=10.0,
            evaluate_every=max(math.floor(epochs / _NUM_EVALUATIONS), 1) if is_scored else None,
            **_rates(optimizer, batch_size=_usual_batch_size(cost, on_gpu=False)),
        ),
        predict=PredictSpec(merge="auto"),
    ).with_pyramid(cost.pyramid, train=data.train)


def suggest_negatives(cost: CostPlan, *, epochs: float) -> tuple[NegativeSpec, MineSpec]:
    """Return how negative chips are chosen, and the share of the images that is searched for them.

    A short training makes too many false alarms to teach them apart, and has none. In a longer one the search takes
    at most about a tenth of the time of training; see docs/negatives.md.
    """
    if epochs < _FEWEST_MINED_EPOCHS or not cost.num_chips:
        return NegativeSpec(), MineSpec()
    training = epochs * cost.megapixels.chips * cost.num_images_with_boxes
    searching = SEARCH_SHARE * cost.megapixels.pyramid * cost.num_images
    share = math.floor(100 * _MINING_SHARE * training / searching) / 100
    return NegativeSpec(source="self"), MineSpec(share=min(max(share, 0.01), 1.0))


def suggest_batch_size(cost: CostPlan, *, on_gpu: bool) -> int:
    """Return the number of chips per step: the usual one, or fewer where a small set would be trained in few steps."""
    batch_size = _usual_batch_size(cost, on_gpu=on_gpu)
    while batch_size > _MIN_BATCH_SIZE and cost.num_steps(batch_size) * _EPOCHS[1] < _MIN_STEPS:
        batch_size //= 2
    return batch_size


def _usual_batch_size(cost: CostPlan, *, on_gpu: bool) -> int:
    return int(2 ** round(math.log2(max(_BATCH_SIDES[on_gpu] / cost.pyramid.chip_size, 1))))


def _suggest_model(
    cost: CostPlan, *, model: DetectorSpec | None, neck: Literal["concat", "fpn"], on_gpu: bool
) -> DetectorSpec:
    """Return the detector: the usual sizes of its layers on a GPU, smaller ones on a CPU.

    A detector with a backbone of its own has the sizes that its weights were trained with.
    """
    if model is not None and model.kind != "two_stage":
        return model if model.has_own_backbone else _suggest_on_backbone(cost, model=model, on_gpu=on_gpu)
    anchors = fit_anchors(cost)
    if neck == "fpn":
        anchors = tuple(anchors[0] * 2.0**power for power in range(5))
    rpn = RPNSpec(anchor_sizes=anchors, pre_nms_top_n=1000, post_nms_top_n_train=128)
    if on_gpu:
        return DetectorSpec(backbone=BackboneSpec(name=GPU_BACKBONE, neck=neck), rpn=rpn)
    return DetectorSpec(
        backbone=BackboneSpec(name=CPU_BACKBONE, neck=neck),
        rpn=replace(rpn, channels=128),
        roi_head=RoIHeadSpec(channels=64, hidden_dim=512),
    )


def with_mask_head(model: DetectorSpec, *, has_masks: bool, on_gpu: bool) -> DetectorSpec:
    """Return the detector with a mask head if the data set has masks, and without one if it has none.

    The head is the usual one on a GPU, a smaller one on a CPU. A detector that has one keeps it.
    """
    if model.kind != "two_stage" or (has_masks and model.mask_head is not None):
        return model
    head = None
    if has_masks:
        head = MaskHeadSpec()
        if not on_gpu:
            head = MaskHeadSpec(channels=_CPU_CHANNELS, num_convs=_CPU_CONVS, batch_size_per_image=16)
    return replace(model, mask_head=head)


def _suggest_on_backbone(cost: CostPlan, *, model: DetectorSpec, on_gpu: bool) -> DetectorSpec:
    """Return a detector of torchvision on a feature pyramid."""
    first = fit_anchors(cost)[0]
    anchors = None if model.anchor_sizes is None else tuple(first * 2.0**power for power in range(5))
    options = replace(model.torchvision, anchor_sizes=anchors)
    if not on_gpu:
        options = replace(options, channels=_CPU_CHANNELS)
        if model.name != "faster_rcnn":
            options = replace(options, num_convs=_CPU_CONVS)
    name = GPU_BACKBONE if on_gpu else CPU_BACKBONE
    return replace(model, backbone=replace(model.backbone, name=name, neck="fpn"), torchvision=options)


def _rates(optimizer: Literal["sgd", "adamw"], *, batch_size: int) -> dict[str, Any]:
    """Return learning rate, weight decay and start of the warm-up of an optimizer; those of SGD are the paper's."""
    if optimizer == "sgd":
        names = ("learning_rate", "reference_batch_size", "weight_decay", "warmup_start_factor")
        return {"optimizer": optimizer, **{name: getattr(TrainSpec(), name) for name in names}}
    return {
        "optimizer": optimizer,
        "learning_rate": 0.0005,
        "reference_batch_size": batch_size,
        "weight_decay": 0.01,
        "warmup_start_factor": 0.1,
    }


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
