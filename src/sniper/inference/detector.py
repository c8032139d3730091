"""Detect objects in images of any size: run every level, keep its valid range, merge the levels (SNIPER §4).

torch is imported where a detector of it is loaded: one that was exported does without.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sniper.chips import LevelSpec
from sniper.config.experiment import ExperimentSpec, FocusSpec, PredictSpec
from sniper.config.loading import merge_experiment, to_yaml
from sniper.data.datasets import Category
from sniper.data.spec import DataSpec
from sniper.errors import ConfigError
from sniper.files import expand_path
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides, to_xywh
from sniper.inference.merging import merge
from sniper.inference.search import AnyDetect, AnyDetectMasks, DetectFocused, Search, SearchResult
from sniper.inference.sources import Channels, ImageSource

if TYPE_CHECKING:
    import torch

    from sniper.inference.calibration import Calibration
    from sniper.models.protocol import DetectorModel
    from sniper.runs.run import CheckpointChoice, Run

LIBRARY_PREFIXES = ("torchvision:", "transformers:")
"""What the name of a detector of a library begins with, where a run is expected otherwise."""

EXPORTED_SUFFIXES = (".onnx", ".xml", ".pt2")
"""What the name of a detector that `sniper export` has written ends with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Detector:
    """A detector for images of any size: one trained by `sniper`, or any function that detects objects.

    Attributes:
        detect: detects objects in (3, H, W) uint8 tensors on the device, or in (h, w, 3) uint8 arrays if there is none;
            sides may differ. Returns the detections of each image in its own frame.
        detect_masks: detects objects, and returns those that are selected, with masks; None if the detector predicts no
            masks.
        detect_focused: detects objects, with masks or without, and predicts the cells of a focus head; None if the
            detector has none.
        window_sides: sides of windows, if the detector takes only images of these sides, to which it pads smaller ones;
            None for those of `spec.window`.
        mask_side: side of the grids of masks, cells; None if the detector predicts no masks.
        spec: levels and merging.
        categories: classes by label.
        device: device of the detector; None for one that takes arrays instead of tensors.
        min_score: score from which detections are shown: where F1 was best on the validation images of the run. None if
            it is unknown.
        scale: the smallest scale at which the finest level has shown a validation image of the run. None if it is
            unknown.
        data: how image files are read, and whether those that cannot be are skipped.

    Example:
        >>> detector = Detector.load("runs/data")  # doctest: +SKIP
        >>> detector.predict("photo.jpg", min_score=0.3)  # doctest: +SKIP
        Detections(12: 9 car, 3 person)
    """

    detect: AnyDetect
    spec: PredictSpec
    categories: tuple[Category, ...]
    device: "torch.device | None"
    min_score: float | None = None
    scale: float | None = None
    data: DataSpec = field(default_factory=DataSpec)
    detect_masks: AnyDetectMasks | None = None
    mask_side: int | None = None
    detect_focused: DetectFocused | None = None
    window_sides: Sides | None = None

    @classmethod
    def load(
        cls,
        run: "Run | str | os.PathLike[str]",
        device: "torch.device | str | None" = None,
        *,
        spec: ExperimentSpec | None = None,
        predict: Mapping[str, Any] | None = None,
        checkpoint: "CheckpointChoice" = "best",
    ) -> "Detector":
        """Load the weights of a run, and what it has chosen on its validation images; or another detector.

        Args:
            run: the run, or its folder; or `torchvision:NAME`, a detector with torchvision's newest weights, or
                `torchvision:NAME@FILE`, with those of a file, such as `torchvision:fcos_resnet50_fpn`; or
                `transformers:NAME`, a detector of the Hugging Face hub or of a folder that `save_pretrained` has
                written; or a file of `sniper export`, such as `model.onnx`.
            device: device to compute on; by default a GPU if there is one, else the CPU.
            spec: an experiment to use instead of the run's, with the same model.
            predict: other values of fields of `predict`, such as `{"merge": "hard", "max_detections": 500}`; text is
                read as YAML.
            checkpoint: `best`, the one with the best validation AP, or the newest if none has been evaluated; `last`,
                the newest; or the number of its step.

        Raises:
            RunError: if there is no such run, it has no such checkpoint, or what it has chosen cannot be read.
            ConfigError: if its experiment cannot be read, or has trained the RPN only; or a focus is set for one level.
            CheckpointError: if its weights cannot be read, or belong to another model.
            ExportError: if an exported file cannot be read.
        """
        if isinstance(run, str | os.PathLike):
            if is_library(run):
                return _load_library(str(run), device, spec=spec, predict=predict, checkpoint=checkpoint)
            path = expand_path(run)
            if path.suffix in EXPORTED_SUFFIXES and not path.is_dir():
                from sniper.inference.exported import load_exported

                if spec is not None or checkpoint != "best":
                    raise ConfigError(f"{path}: is no run, and has neither an experiment nor checkpoints")
                return load_exported(path, device=None if device is None else str(device), predict=predict)
        from sniper.inference.loading import load_run

        return load_run(run, device, spec=spec, predict=predict, checkpoint=checkpoint)

    @classmethod
    def from_model(
        cls,
        model: "DetectorModel",
        *,
        spec: ExperimentSpec,
        categories: tuple[Category, ...],
        device: "torch.device",
    ) -> "Detector":
        """Wrap a model that is in evaluation mode and on its device."""
        from sniper.inference.loading import detect_focused_with, detect_masks_with, detect_with

        copy, precision = model.for_inference(), spec.predict.precision
        detect_masks = partial(detect_masks_with, copy, precision=precision, device=device)
        detect_focused = partial(detect_focused_with, copy, precision=precision, device=device)
        return cls(
            detect=partial(detect_with, copy, precision=precision, device=device),
            detect_masks=None if model.spec.mask_side is None else detect_masks,
            mask_side=model.spec.mask_side,
            detect_focused=detect_focused if model.spec.focus else None,
            spec=spec.predict,
            categories=categories,
            device=device,
            data=spec.data,
        )

    def calibrated(self, calibration: "Calibration") -> "Detector":
        """Return this detector with what was chosen on validation images."""
        return replace(
            self,
            spec=calibration.resolve(self.spec),
            min_score=calibration.min_score,
            scale=calibration.scale,
        )

    def with_focus(self, focus: FocusSpec | None) -> "Detector":
        """Return this detector with finer levels searched where a focus says, or everywhere."""
        return replace(self, spec=replace(self.spec, focus=focus))

    def predict(
        self, image: ImageSource, *, min_score: float | None = None, channels: Channels = "RGB"
    ) -> Detections:
        """Detect objects in one image.

        Args:
            image: path of an image file, bytes of one, Pillow image, array (h, w, 3) or (h, w), or tensor (3, h, w) or
                (h, w). Arrays and tensors are uint8, or of any other number type with `data.read.intensity_range`.
            min_score: return only detections of at least this score, and no second box on an object; see
                `Detections.confident`. None returns all detections, as results files have them.
            channels: order of the colours in an array or tensor; OpenCV's arrays are BGR.

        Returns:
            Merged detections in the image frame, best first, with class names and the detector's `min_score`.

        Raises:
            ImageError: if it cannot be read, or has more than 8 bits a channel and no intensity range is configured.
            ValueError: if an array or tensor has another type or shape, or the score is not from 0 to 1.
            OutOfMemory: if a window of it does not fit into the device's memory.
        """
        strict = replace(self, data=replace(self.data, on_bad_image="refuse"))
        (detections,) = strict.predict_many([image], min_score=min_score, channels=channels)
        assert detections is not None
        return detections

    def predict_many(
        self,
        images: Iterable[ImageSource],
        *,
        min_score: float | None = None,
        channels: Channels = "RGB",
        on_progress: Callable[[float], None] = lambda num_done: None,
    ) -> Iterator[Detections | None]:
        """Detect objects in many images: several in one batch, the next ones read meanwhile.

        Args:
            images: as for `predict`; taken from the iterable as they are needed.
            min_score: as for `predict`.
            channels: as for `predict`.
            on_progress: called within large images (16 megapixels and more) with the number of images that are
                searched, and the share of this one: 1.25 after a quarter of the second image.

        Returns:
            The detections of each image, as from `predict`, in the order given. Images come in groups of up to 32.
            None for an image that cannot be read, if `data.on_bad_image` is `skip`.

        Warns:
            UserWarning: if an image is shown at less than half of the scale of the validation images, since the levels
                resize every image to the same length.

        Raises:
            ImageError: as from `predict`, of an image that is not to be skipped.
            ValueError: if an array or tensor has another type or shape, or the score is not from 0 to 1.
            OutOfMemory: if a window does not fit into the device's memory.
        """
        if min_score is not None and not 0 <= min_score <= 1:
            raise ValueError(f"min_score: expected a score from 0 to 1, not {min_score}")
        class_names = tuple(category.name for category in self.categories)
        for result in self.search(images, channels=channels, on_progress=on_progress):
            if result is None:
                yield None
                continue
            self._warn_if_shrunk(result)
            merged = replace(
                merge(result.detections, self.spec), class_names=class_names, min_score=self.min_score
            )
            yield merged if min_score is None else merged.confident(min_score)

    def _warn_if_shrunk(self, result: SearchResult) -> None:
        """Warn of an image that is shown smaller than the validation images were.

        Levels of a fixed length suit photos, whose objects grow with the number of pixels. In an image that was put
        together from several, or that shows a larger area, objects are as large in pixels as before, and would be lost.
        """
        if self.scale is None or any(level.factor is not None for level in self.spec.levels):
            return
        scale = finest_scale(self.spec.levels, result.width, result.height)
        if scale < self.scale / 2:
            warnings.warn(
                f"an image of {result.width}x{result.height} pixels is searched at {scale:.2g} of its size, the "
                f"validation images at {self.scale:.2g} or more: predict.levels resizes every image to the same "
                "length. If its objects have as many pixels as theirs, search it with levels of a fixed factor: "
                f"predict.levels '[{{factor: {self.scale:.2g}}}]'",
                stacklevel=2,
            )

    def search(
        self,
        images: Iterable[ImageSource],
        *,
        channels: Channels = "RGB",
        with_masks: bool = True,
        keeps_all_sizes: bool = False,
        on_progress: Callable[[float], None] = lambda num_done: None,
    ) -> Iterator[SearchResult | None]:
        """Detect objects in many images at all levels, without merging. See `predict_many`.

        Args:
            images: as for `predict_many`.
            channels: as for `predict`.
            with_masks: whether to predict masks, if the detector does.
            keeps_all_sizes: whether results have all that was found at each level, too.
            on_progress: as for `predict_many`.

        Raises:
            ConfigError: if the focus needs a focus head, and the detector has none.
        """
        focus = (
            self.spec.focus if isinstance(self.spec.focus, FocusSpec) and self.window_sides is None else None
        )
        if focus is not None and focus.cues == "head" and self.detect_focused is None:
            raise ConfigError(
                "predict.focus.cues: head needs a detector with a focus head; this one was trained without "
                "(model.focus), or is exported"
            )
        search = Search(
            detect=self.detect,
            levels=self.spec.levels,
            in_valid_range=True,
            window=self.window_sides or self.spec.window,
            batch_megapixels=self.spec.batch_megapixels,
            device=self.device,
            data=self.data,
            channels=channels,
            detect_masks=self.detect_masks if with_masks else None,
            detect_focused=self.detect_focused,
            focus=focus,
            keeps_all_sizes=keeps_all_sizes,
            on_progress=on_progress,
        )
        return search(images)


def is_library(name: object) -> bool:
    """Check whether a name is that of a detector of a library."""
    return isinstance(name, str) and name.startswith(LIBRARY_PREFIXES)


def finest_scale(levels: Sequence[LevelSpec], width: int, height: int) -> float:
    """Return the scale at which the finest level shows an image; see `Level.scale`.

    Args:
        levels: at least one.
        width: of the image, pixels.
        height: of the image, pixels.
    """
    return max(level.at(width=width, height=height).scale for level in levels)


def with_predict(spec: ExperimentSpec, predict: Mapping[str, Any] | None) -> ExperimentSpec:
    """Return an experiment with other values of fields of `predict`."""
    if not predict:
        return spec
    changes = to_yaml({f"predict.{name}": value for name, value in predict.items()})
    return merge_experiment(spec, None, overrides=changes)


def _load_library(
    name: str,
    device: "torch.device | str | None",
    *,
    spec: ExperimentSpec | None,
    predict: Mapping[str, Any] | None,
    checkpoint: "CheckpointChoice",
) -> Detector:
    from sniper.inference.loading import load_library_detector

    if spec is not None or checkpoint != "best":
        raise ConfigError(f"{name}: is no run, and has neither an experiment nor checkpoints")
    detector, _ = load_library_detector(name, device, spec=with_predict(ExperimentSpec(), predict))
    return detector


def to_coco(
    detections: Detections, *, image_id: int | str, categories: tuple[Category, ...]
) -> list[dict[str, Any]]:
    """Convert the detections of one image to COCO results: boxes as xywh to 0.01 px, scores to 5 digits.

    Masks are run-length encodings at the size of the image (`segmentation`).
    """
    boxes, scores = round_detections(detections)
    masks = [] if detections.masks is None else detections.masks.to_rle().to_coco()
    entries = [
        {
            "image_id": image_id,
            "category_id": categories[label].category_id,
            "bbox": box,
            "score": score,
        }
        for box, score, label in zip(boxes.tolist(), scores, detections.labels.tolist(), strict=True)
    ]
    for entry, mask in zip(entries, masks, strict=False):
        entry["segmentation"] = mask
    return entries


def round_detections(detections: Detections) -> tuple[Float[np.ndarray, "n 4"], list[float]]:
    """Return boxes, as xywh to 0.01 px, and scores, to 5 digits, as results have them."""
    return np.round(to_xywh(detections.boxes), 2), [round(score, 5) for score in detections.scores.tolist()]
