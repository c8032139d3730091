"""The numbers of an experiment: training and inference, and all parts put together."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from sniper.chips import LevelSpec, PyramidSpec
from sniper.chips.negatives import NegativeSpec
from sniper.data.spec import DataSpec, SourceSpec
from sniper.models.spec import DetectorSpec, Precision


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How to train; the defaults are the paper's, stated for its batch of 128 chips (SNIPER §4).

    Rates are for gradients averaged over a batch of `reference_batch_size` chips, and scaled to the actual batch: in
    proportion with SGD, with the square root of the ratio with AdamW. The paper's 0.015, 0.0005 and 1e-4 are for
    gradients summed over eight devices: here rates are eight times as high, and the decay with them is an eighth.

    Attributes:
        epochs: passes over the plan; fractions allowed.
        batch_size: chips in a step, on all devices together.
        accumulation_steps: parts into which a device splits its share of a batch, computed one after the other; batch
            norm sees one part at a time.
        optimizer: `sgd`, or `adamw` with torch's other numbers.
        learning_rate: after warm-up, for the reference batch.
        reference_batch_size: chips in the batch that the rates are stated for.
        warmup_steps: steps over which the rate rises in a straight line.
        warmup_start_factor: the learning rate of the first step as a fraction of `learning_rate`.
        milestones: epochs at which the rate is multiplied by `gamma`; fractions allowed.
        gamma: see above.
        momentum: of SGD.
        weight_decay: of either optimizer; not scaled with the batch.
        clip_grad_norm: scale gradients down to this norm; None leaves them alone.
        ema_decay: keep an average of the weights, to be used after training, that forgets no faster than with this
            decay a step; at first it forgets faster. None keeps none.
        precision: `bf16` or `fp16` autocast, `fp32`, or `auto`: bf16 where the device computes it natively, else fp32.
        compile: let torch compile the trunk; takes a minute at the start.
        evaluate_every: score the test images after this many epochs, and at the end; None does not.
        tensorboard: write the metrics for TensorBoard, too.
        checkpoint_minutes: minutes between checkpoints; one is always written at the end of an epoch.
        keep_checkpoints: the newest this many are kept.
        rpn_only: train the region proposal network alone, on positive chips: enough to mine with.
    """

    epochs: float = 6.0
    batch_size: int = 128
    accumulation_steps: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.12
    reference_batch_size: int = 128
    warmup_steps: int = 1000
    warmup_start_factor: float = 1 / 30
    milestones: tuple[float, ...] = (5.33,)
    gamma: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1.25e-5
    clip_grad_norm: float | None = None
    ema_decay: float | None = None
    precision: Precision = "auto"
    compile: bool = False
    evaluate_every: int | None = None
    tensorboard: bool = False
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    rpn_only: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "gamma", "checkpoint_minutes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {self.momentum}")
        if not all(0 <= at < math.inf for at in self.milestones):
            raise ValueError(f"milestones must be epochs from 0 on, not {list(self.milestones)}")
        for name in ("warmup_steps", "warmup_start_factor", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("batch_size", "accumulation_steps", "reference_batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps: {self.batch_size} chips (batch_size) cannot be split into "
                f"{self.accumulation_steps} equal parts"
            )
        self._check_choices()

    def _check_choices(self) -> None:
        """Refuse what makes no sense among the fields that may be null."""
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be positive or null, not {self.clip_grad_norm}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, or null, not {self.ema_decay}")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1 or null, not {self.evaluate_every}")
        if self.evaluate_every is not None and self.rpn_only:
            raise ValueError("evaluate_every: an RPN alone (rpn_only) names no objects to be scored")


@dataclass(frozen=True, kw_only=True)
class MineSpec:
    """How to look for what the detector is wrong about: with `negatives.source: mined`, or by `sniper mine`.

    Images are searched at the levels of inference; each level gives as many proposals as `model.rpn.post_nms_top_n`.

    Attributes:
        rpn_epochs: passes over the positive chips that train the RPN alone first; fractions allowed.
        every_epochs: mine again with the newest weights after so many epochs; None mines once, with the RPN.
        nms_iou: of two proposals of an image that overlap more, the worse is dropped.
        batch_megapixels: millions of pixels, padding included, to compute on at once.
    """

    rpn_epochs: float = 2.0
    every_epochs: int | None = None
    nms_iou: float = 0.7
    batch_megapixels: float = 8.0

    def __post_init__(self) -> None:
        for name in ("rpn_epochs", "batch_megapixels"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.every_epochs is not None and self.every_epochs < 1:
            raise ValueError(f"every_epochs must be at least 1 or null, not {self.every_epochs}")
        if not 0 <= self.nms_iou <= 1:
            raise ValueError(f"nms_iou is a share from 0 to 1, not {self.nms_iou}")


PAPER_TEST_LEVELS = (
    LevelSpec(short_side=1400, max_long_side=2000, below=90),
    LevelSpec(short_side=800, max_long_side=1280, at_least=32, below=180),
    LevelSpec(short_side=480, max_long_side=512, at_least=75),
)


def widened(levels: tuple[LevelSpec, ...]) -> tuple[LevelSpec, ...]:
    """Give test levels for a pyramid that was trained on: the same scales, ranges wider as in the paper's code.

    There [0, 80) became (0, 90], [32, 150) (32, 180] and [120, ∞) (75, ∞).
    """
    *finer, last = levels
    wider = [replace(level, below=round(level.below * 1.2)) for level in finer]
    return (*wider, replace(last, at_least=round(last.at_least * 0.625)))


@dataclass(frozen=True, kw_only=True)
class PredictSpec:
    """How to find objects in whole images; the defaults are those of the paper's code.

    Attributes:
        levels: the pyramid of whole images; detections count at a level if their size lies in its range.
        merge: how overlapping detections of all levels become one: soft-NMS, `gaussian` or `linear`; `hard` NMS; or
            `fusion`, the mean of boxes weighted by their scores.
        soft_nms_sigma: width of the Gaussian.
        merge_iou: of all but the Gaussian: what overlaps by more is the same object.
        score_threshold: detections below this score after merging are dropped.
        max_detections: per image.
        window: a level image with a longer side than this is searched in overlapping windows of it, level pixels.
        batch_megapixels: so many megapixels of level images are searched at once; fewer where they do not fit.
        precision: `bf16` autocast, `fp32`, or `auto`: bf16 where the device computes it natively.
    """

    levels: tuple[LevelSpec, ...] = PAPER_TEST_LEVELS
    merge: Literal["gaussian", "linear", "hard", "fusion"] = "gaussian"
    soft_nms_sigma: float = 0.55
    merge_iou: float = 0.5
    score_threshold: float = 0.001
    max_detections: int = 200
    window: int = 4096
    batch_megapixels: float = 8.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("inference needs at least one level")
        if not self.soft_nms_sigma > 0:
            raise ValueError(f"soft_nms_sigma must be positive, not {self.soft_nms_sigma}")
        if not 0 <= self.score_threshold < 1:
            raise ValueError(f"score_threshold must be in [0, 1), not {self.score_threshold}")
        if self.max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, not {self.max_detections}")
        if not 0 < self.merge_iou < 1:
            raise ValueError(f"merge_iou must be in (0, 1), not {self.merge_iou}")
        if self.window < 256:
            raise ValueError(f"window must be at least 256, not {self.window}")
        if not 0 < self.batch_megapixels < math.inf:
            raise ValueError(f"batch_megapixels must be positive, not {self.batch_megapixels}")


@dataclass(frozen=True, kw_only=True)
class ExperimentSpec:
    """Everything that decides what a run does.

    Attributes:
        seed: of the first weights, the chips, their order and the anchors drawn.
        data: what to learn from.
        pyramid: how to cut it into chips.
        negatives: which chips without objects to learn from.
        mine: how to find them.
        model: the detector.
        train: how to train it.
        predict: how to use it.
    """

    seed: int = 0
    data: DataSpec = DataSpec()
    pyramid: PyramidSpec = PyramidSpec()
    negatives: NegativeSpec = NegativeSpec()
    mine: MineSpec = MineSpec()
    model: DetectorSpec = DetectorSpec()
    train: TrainSpec = TrainSpec()
    predict: PredictSpec = PredictSpec()

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, not {self.seed}")
        if self.negatives.source == "mined" and self.data.chips is not None:
            raise ValueError(
                "data.chips brings its own negative chips; with it, negatives.source must be none"
            )
        ways = [name for name in ("whole", "tiles") if getattr(self.data, name) is not None]
        if self.negatives.source == "mined" and ways:
            raise ValueError(f"negatives.source: negative chips go with chips, not with data.{ways[0]}")
        if len(self.negatives.min_proposals) > max(
            len(self.pyramid.levels), len(NegativeSpec().min_proposals)
        ):
            raise ValueError(
                f"negatives.min_proposals has {len(self.negatives.min_proposals)} numbers "
                f"for {len(self.pyramid.levels)} levels"
            )
        if self.negatives.source == "mined" and self.train.rpn_only:
            raise ValueError(
                "train.rpn_only trains on positive chips; with it, negatives.source must be none"
            )

    def with_pyramid(self, pyramid: PyramidSpec, *, train: SourceSpec) -> "ExperimentSpec":
        """Give this experiment with another pyramid, for training and for the search in whole images.

        Args:
            pyramid: what to cut chips from.
            train: the data set that it was made for.
        """
        return replace(
            self,
            data=replace(self.data, train=train, chips=None, whole=None, tiles=None),
            pyramid=pyramid,
            predict=replace(self.predict, levels=widened(pyramid.levels)),
        )
