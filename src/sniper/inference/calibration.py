"""What a run has chosen on its validation images: how detections are merged, and from which score they are shown."""

import json
from dataclasses import asdict, replace
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AllowInfNan, RootModel

from sniper.config.experiment import PredictSpec
from sniper.errors import RunError
from sniper.files import atomic_write, read_bytes
from sniper.inference.merging import MergeMethod
from sniper.runs.run import Run
from sniper.specs import Fraction, parse_json, spec_dataclass


@spec_dataclass
class MergeCandidate:
    """A way to merge detections, and its scores on the images that were compared.

    Attributes:
        merge: method, see `PredictSpec`.
        soft_nms_sigma: width of Gaussian soft-NMS; the other methods do not use it.
        merge_iou: IoU of the other methods.
        ap: COCO's AP; -1 without objects.
        ap50: the same at IoU 0.5.
    """

    merge: MergeMethod
    soft_nms_sigma: Annotated[float, Gt(0), AllowInfNan(True)]
    merge_iou: Annotated[float, Gt(0), Lt(1)]
    ap: Annotated[float, Ge(-1), Le(1)]
    ap50: Annotated[float, Ge(-1), Le(1)]


@spec_dataclass
class Calibration:
    """What was chosen on the validation images with the weights of one step.

    Attributes:
        step: of the weights.
        num_images: number of validation images.
        num_compared: number of them on which the candidates were compared; 0 if `predict.merge` was set.
        merge: the method with the best AP, or the one that was set.
        soft_nms_sigma: width of Gaussian soft-NMS.
        merge_iou: IoU of the other methods.
        min_score: score from which detections are shown: that of the best F1 at IoU 0.5 over all classes together,
            without second boxes on an object. None if no detection matched an object.
        f1: at this score.
        precision: at this score.
        recall: at this score.
        scale: the smallest scale at which the finest level has shown an image; None in runs of earlier versions.
        candidates: the ways to merge that were compared, the default first.
    """

    step: Annotated[int, Ge(0)]
    num_images: Annotated[int, Ge(0)]
    num_compared: Annotated[int, Ge(0)]
    merge: MergeMethod
    soft_nms_sigma: Annotated[float, Gt(0), AllowInfNan(True)]
    merge_iou: Annotated[float, Gt(0), Lt(1)]
    min_score: Fraction | None
    f1: Fraction
    precision: Fraction
    recall: Fraction
    scale: Annotated[float, Gt(0)] | None = None
    candidates: tuple[MergeCandidate, ...] = ()

    def resolve(self, spec: PredictSpec) -> PredictSpec:
        """Return the settings of prediction with the chosen way to merge in place of `auto`."""
        if spec.merge != "auto":
            return spec
        return replace(spec, merge=self.merge, soft_nms_sigma=self.soft_nms_sigma, merge_iou=self.merge_iou)


class _Calibrations(RootModel[tuple[Calibration, ...]]):
    """The choices with all checkpoints, the latest last."""


def load_calibration(run: Run, *, step: int | None = None) -> Calibration | None:
    """Read what a run has chosen on its validation images; None if it has chosen nothing.

    Args:
        run: the run.
        step: of the weights in use. The latest choice is returned where it is None, or nothing was chosen with them.

    Raises:
        RunError: if the file cannot be read.
    """
    calibrations = _load_all(run)
    of_step = [calibration for calibration in calibrations if calibration.step == step]
    return next(reversed(of_step or calibrations), None)


def save_calibration(run: Run, calibration: Calibration) -> None:
    """Write what was chosen with the weights of a step, beside the choices with other checkpoints that are there.

    Raises:
        RunError: if the choices of earlier steps cannot be read.
    """
    steps = {int(path.name) for path in run.checkpoints} - {calibration.step}
    others = [each for each in _load_all(run) if each.step in steps]
    content = json.dumps([asdict(each) for each in (*others, calibration)], indent=1)
    with atomic_write(run.calibration_path) as file:
        file.write(content.encode())


def _load_all(run: Run) -> list[Calibration]:
    """Read the choices with all checkpoints, the latest last."""
    path = run.calibration_path
    if not path.exists():
        return []
    try:
        return list(parse_json(read_bytes(path), _Calibrations).root)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: cannot be read ({error}); delete it to show detections from a score of 0.3, and to merge them "
            "by Gaussian soft-NMS"
        ) from error
