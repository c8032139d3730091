"""Configuration of training, mining and inference, and of the whole experiment."""

import math
from dataclasses import replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic import AllowInfNan, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from sniper.chips import LevelSpec, PyramidSpec
from sniper.chips.baselines import MAX_BATCH_MEGAPIXELS
from sniper.chips.negatives import NegativeSpec
from sniper.chips.pyramid import MAX_CHIP_SIZE, MAX_LEVELS
from sniper.data.spec import DataSpec, SourceSpec
from sniper.errors import counted
from sniper.models.spec import DetectorSpec, Precision
from sniper.specs import Fraction, spec_dataclass

_OWN_RATES = {"sgd": (0.12, 1.25e-5), "adamw": (0.0014, 0.01)}
"""Learning rate for a batch of 128 chips and weight decay of each optimizer; those of SGD are the paper's."""

_MAX_ADAMW_RATE = 0.02

TrackerName = Literal["tensorboard", "mlflow", "wandb"]

MAX_BATCH_SIZE = 65_536
"""The most chips in a batch; 65,536 chips of 64 pixels a side have 3 GB."""

MAX_DETECTIONS = 1_000_000
"""The most detections of an image."""

MAX_SEED = 2**63 - 1
"""The largest seed of torch's generators."""

_MAX_EPOCHS = 1e6
_MAX_CHIP_MEGAPIXELS = 4000.0  # of a batch on all devices together: 12 GB as it is read


@spec_dataclass
class TrainSpec:
    """How to train; the defaults are the paper's, stated for its batch of 128 chips (SNIPER §4).

    Learning rates are for gradients averaged over a batch of `reference_batch_size` chips, and are scaled to the actual
    batch: linearly with SGD, with the square root of the ratio with AdamW. Where they are not set, learning rate and
    weight decay are the optimizer's own: 0.12 and 1.25e-5 for SGD, 0.0014 and 0.01 for AdamW. The paper's rates of
    0.015 and 0.0005 and weight decay of 1e-4 are for gradients summed over eight devices: here the rates are eight
    times as high, and the weight decay is an eighth. An epoch of the paper shows every image and its mirrored copy, an
    epoch here shows each chip once, mirrored at random: the paper's 6 epochs are 12.

    Attributes:
        epochs: passes over the training set; fractions allowed.
        batch_size: chips per step, on all devices together.
        accumulation_steps: parts into which a device splits its share of a batch, computed one after the other; batch
            norm sees one part at a time.
        optimizer: `sgd`, or `adamw` with torch's defaults for its other settings.
        learning_rate: after warmup, for the reference batch; None is the optimizer's own.
        reference_batch_size: chips in the batch that the learning rates are stated for.
        warmup_steps: steps over which the learning rate rises linearly.
        warmup_start_factor: the learning rate of the first step as a fraction of `learning_rate`.
        schedule: of the learning rate after warmup: `steps` multiplies it by `gamma` at the milestones; `cosine` lowers
            it to 0 at the end along half a cosine (Loshchilov & Hutter 2017).
        milestones: epochs at which `steps` lowers the learning rate; fractions allowed.
        gamma: factor of the learning rate at each milestone of `steps`.
        momentum: momentum of SGD.
        weight_decay: of either optimizer, not scaled with the batch; None is the optimizer's own.
        clip_grad_norm: largest norm of the gradients, which are scaled down to it; None does not clip.
        ema_decay: decay per step of an exponential moving average of the weights, which is used after training; the
            decay is smaller in the first steps. None keeps no average.
        precision: `bf16` or `fp16` autocast, `fp32`, or `auto`: bf16 where the device computes it natively, else fp32.
        compile: compile the backbone with torch; takes a minute at the start.
        evaluate_every: evaluate on the test set after every this many epochs, and at the end; None does not evaluate.
        evaluate_images: test images to evaluate on while training, a subset drawn by the seed; the best checkpoint is
            evaluated on all at the end. None evaluates on all.
        patience: evaluations without a better AP that end the training; None trains to the end.
        trackers: where the metrics are recorded beside the file of the run: `tensorboard`, `mlflow` and `wandb`
            (Weights & Biases), each with the package of this name.
        report: write the page `report.html` of the run after every epoch.
        checkpoint_minutes: minutes between checkpoints; one is always written at the end of an epoch.
        keep_checkpoints: number of newest checkpoints to keep, beside the one with the best AP.
        rpn_only: train the region proposal network alone, on positive chips, for mining.
    """

    epochs: Annotated[PositiveFloat, Le(_MAX_EPOCHS)] = 12.0
    batch_size: Annotated[PositiveInt, Le(MAX_BATCH_SIZE)] = 128
    accumulation_steps: PositiveInt = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: PositiveFloat | None = None
    reference_batch_size: PositiveInt = 128
    warmup_steps: NonNegativeInt = 1000
    warmup_start_factor: Fraction = 1 / 30
    schedule: Literal["steps", "cosine"] = "steps"
    milestones: tuple[NonNegativeFloat, ...] = (10.67,)
    gamma: PositiveFloat = 0.1
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: NonNegativeFloat | None = None
    clip_grad_norm: Annotated[float, Gt(0), AllowInfNan(True)] | None = None
    ema_decay: Annotated[float, Gt(0), Lt(1)] | None = None
    precision: Precision = "auto"
    compile: bool = False
    evaluate_every: PositiveInt | None = None
    evaluate_images: PositiveInt | None = None
    patience: PositiveInt | None = None
    trackers: tuple[TrackerName, ...] = ()
    report: bool = True
    checkpoint_minutes: PositiveFloat = 10.0
    keep_checkpoints: PositiveInt = 2
    rpn_only: bool = False

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps: a batch of {counted(self.batch_size, 'chip')} cannot be split into "
                f"{self.accumulation_steps} equal parts"
            )
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers: expected each once, not {', '.join(self.trackers)}")
        if self.evaluate_every is not None and self.rpn_only:
            raise ValueError("evaluate_every must be null with rpn_only: an RPN alone detects no classes")
        learning_rate, weight_decay = _OWN_RATES[self.optimizer]
        if self.weight_decay is None:
            object.__setattr__(self, "weight_decay", weight_decay)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", learning_rate)
        elif self.optimizer == "adamw" and self.learning_rate > _MAX_ADAMW_RATE:
            raise ValueError(
                f"learning_rate: {self.learning_rate:g} is a rate for sgd; adamw's own is {learning_rate:g} (null)"
            )
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience needs evaluate_every, which is null")


@spec_dataclass
class MineSpec:
    """How to mine for negative chips: with `negatives.source`, or by `sniper mine`.

    Images are searched at the levels of inference. The detector searches as in inference; an RPN gives up to
    `model.rpn.post_nms_top_n` proposals at each level.

    Attributes:
        start: share of the epochs after which the detector mines first, with `negatives.source: self`.
        every_epochs: mine again with the newest weights after every this many epochs; None mines once.
        share: of the images that the detector searches each time, drawn at random anew.
        max_iou: a detection whose IoU with an object is at least this is no false alarm.
        rpn_epochs: passes over the positive chips that train the RPN alone first, with `negatives.source: rpn`;
            fractions allowed. None makes as many as take 500 steps, at least the four of the paper.
        nms_iou: threshold of the NMS over the proposals of an image.
        batch_megapixels: millions of pixels per batch, padding included.
    """

    start: Fraction = 0.5
    every_epochs: PositiveInt | None = None
    share: Annotated[PositiveFloat, Le(1)] = 1.0
    max_iou: Fraction = 0.3
    rpn_epochs: Annotated[PositiveFloat, Le(_MAX_EPOCHS)] | None = None
    nms_iou: Fraction = 0.7
    batch_megapixels: Annotated[PositiveFloat, Le(MAX_BATCH_MEGAPIXELS)] = 8.0


PAPER_TEST_LEVELS = (
    LevelSpec(short_side=1400, max_long_side=2000, below=90),
    LevelSpec(short_side=800, max_long_side=1280, at_least=32, below=180),
    LevelSpec(short_side=480, max_long_side=512, at_least=75),
)


def widened(levels: tuple[LevelSpec, ...]) -> tuple[LevelSpec, ...]:
    """Return test levels for a pyramid that was trained on: the same scales with wider ranges, as in the paper's code.

    There [0, 80) became (0, 90], [32, 150) (32, 180] and [120, ∞) (75, ∞).
    """
    *finer, last = levels
    wider = [
        replace(level, below=round(level.below * 1.2)) if math.isfinite(level.below) else level
        for level in finer
    ]
    return (*wider, replace(last, at_least=round(last.at_least * 0.625)))


@spec_dataclass
class FocusSpec:
    """Where fine levels are searched: in windows that coarser levels suspect to show their objects.

    Attributes:
        min_score: sum of the scores of such cues from which on a window is searched.
        window: side of a window, level pixels, a multiple of 64.
        cues: `detections` of all coarser levels, unsure ones too; or the cells of the `head` that `model.focus` trains,
            at the next coarser level.
    """

    min_score: PositiveFloat
    window: Annotated[int, Ge(128), MultipleOf(64), Le(MAX_CHIP_SIZE)]
    cues: Literal["detections", "head"] = "detections"


@spec_dataclass
class PredictSpec:
    """How to detect objects in whole images; the defaults are those of the paper's code.

    Attributes:
        levels: the image pyramid; a level reports the detections whose size is in its range.
        merge: how overlapping detections of all levels are merged: soft-NMS, `gaussian` or `linear`; `hard` NMS;
            `fusion`, the mean of boxes weighted by their scores; or `auto`, the method, `soft_nms_sigma` and
            `merge_iou` with the best AP on the validation images of the run, Gaussian soft-NMS where there are none.
        soft_nms_sigma: sigma of Gaussian soft-NMS.
        merge_iou: IoU above which detections are merged; not used by Gaussian soft-NMS.
        score_threshold: detections with a lower score after merging are dropped.
        max_detections: detections per image, at most.
        window: longest side of a level image that is searched at once; a larger one is searched in overlapping windows
            of this side, level pixels.
        batch_megapixels: millions of pixels of level images per batch; fewer where they do not fit into memory.
        precision: `bf16` autocast, `fp32`, or `auto`: bf16 where the device computes it natively.
        focus: search the finer levels only where small objects are likely; `null` searches every level as a whole;
            `auto` as `sniper focus` has chosen for the weights of the run, and as a whole where it has not.
    """

    levels: Annotated[tuple[LevelSpec, ...], MinLen(1), MaxLen(MAX_LEVELS)] = PAPER_TEST_LEVELS
    merge: Literal["auto", "gaussian", "linear", "hard", "fusion"] = "gaussian"
    soft_nms_sigma: Annotated[float, Gt(0), AllowInfNan(True)] = 0.55
    merge_iou: Annotated[float, Gt(0), Lt(1)] = 0.5
    score_threshold: Annotated[float, Ge(0), Lt(1)] = 0.001
    max_detections: Annotated[PositiveInt, Le(MAX_DETECTIONS)] = 200
    window: Annotated[int, Ge(256)] = 4096
    batch_megapixels: Annotated[PositiveFloat, Le(MAX_BATCH_MEGAPIXELS)] = 8.0
    precision: Precision = "auto"
    focus: FocusSpec | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        if self.merge != "auto":
            return
        for name, field in type(self).__dataclass_fields__.items():
            if name in ("soft_nms_sigma", "merge_iou") and getattr(self, name) != field.default:
                raise ValueError(
                    f"merge: auto chooses {name} itself; leave it at {field.default:g}, or set another merge"
                )


@spec_dataclass
class ExperimentSpec:
    """All settings of a run.

    Attributes:
        seed: seed of the initial weights, the chips, their order and the sampled anchors.
        data: the data sets, and how chips are read.
        pyramid: the pyramid that chips are cut from.
        negatives: which negative chips to train on.
        mine: how to mine proposals for negative chips.
        model: the detector.
        train: how to train it.
        predict: how to detect objects with it.
    """

    seed: Annotated[NonNegativeInt, Le(MAX_SEED)] = 0
    data: DataSpec = DataSpec()
    pyramid: PyramidSpec = PyramidSpec()
    negatives: NegativeSpec = NegativeSpec()
    mine: MineSpec = MineSpec()
    model: DetectorSpec = DetectorSpec()
    train: TrainSpec = TrainSpec()
    predict: PredictSpec = PredictSpec()

    def __post_init__(self) -> None:
        if self.negatives.source != "none":
            self._check_mined()
        if self.train.rpn_only and not self.model.has_rpn:
            raise ValueError(
                f"train.rpn_only must be false for model.name {self.model.name}, which has no region proposal network"
            )
        if self.model.focus:
            self._check_focus()
        megapixels = self.train.batch_size * self.pyramid.chip_size**2 / 1e6
        if megapixels > _MAX_CHIP_MEGAPIXELS:
            raise ValueError(
                f"train.batch_size: a batch of {self.train.batch_size:,} chips of {self.pyramid.chip_size:,} pixels "
                f"(pyramid.chip_size) has {megapixels:,.0f} million pixels, expected at most "
                f"{_MAX_CHIP_MEGAPIXELS:,.0f}"
            )
        num_levels = max(len(self.pyramid.levels), len(NegativeSpec().min_proposals))
        if len(self.negatives.min_proposals) > num_levels:
            raise ValueError(
                f"negatives.min_proposals has {len(self.negatives.min_proposals)} numbers "
                f"for {counted(len(self.pyramid.levels), 'level')}"
            )

    def _check_focus(self) -> None:
        """Check that a focus head has something to learn."""
        for name in ("whole", "tiles"):
            if getattr(self.data, name) is not None:
                raise ValueError(f"model.focus must be false with data.{name}, which trains on no chips")
        if not any(level.at_least > 0 for level in self.pyramid.levels[1:]):
            raise ValueError(
                "model.focus must be false: no level of pyramid.levels leaves small objects to a finer one (at_least)"
            )

    def _check_mined(self) -> None:
        """Check that negative chips can be mined for this experiment."""
        if self.data.chips is not None:
            raise ValueError(
                "negatives.source must be none with data.chips, which has its own negative chips"
            )
        for name in ("whole", "tiles"):
            if getattr(self.data, name) is not None:
                raise ValueError(f"negatives.source must be none with data.{name}, which trains on no chips")
        if self.negatives.source == "rpn" and not self.model.has_rpn:
            raise ValueError(
                f"negatives.source must not be rpn for model.name {self.model.name}, which has no region proposal "
                "network; self mines with any detector"
            )
        if self.train.rpn_only:
            raise ValueError("negatives.source must be none with train.rpn_only, which uses positive chips")

    def with_pyramid(self, pyramid: PyramidSpec, *, train: SourceSpec) -> "ExperimentSpec":
        """Return this experiment with another pyramid, for training and for inference.

        Args:
            pyramid: the pyramid to cut chips from.
            train: the training set that it was made for.
        """
        return replace(
            self,
            data=replace(self.data, train=train, chips=None, whole=None, tiles=None),
            pyramid=pyramid,
            predict=replace(self.predict, levels=widened(pyramid.levels)),
        )
