"""`sniper export`: write the detector of a run for ONNX Runtime, OpenVINO or torch.export."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sniper.cli.inputs import check_parent, load_images, load_split
from sniper.cli.locks import locking
from sniper.cli.options import ANNOTATIONS_HELP, Checkpoint, Images, Json, default, flag
from sniper.cli.output import print_progress, print_result
from sniper.cli.search import describe_weights, match_classes, parse_checkpoint, split_overrides
from sniper.errors import ConfigError, ExportError, counted
from sniper.runs.lock import lock_file

if TYPE_CHECKING:
    from sniper.geometry.boxes import Sides
    from sniper.inference.exporting import ExportedModel, ExportOptions
    from sniper.inference.loading import LoadedModel
    from sniper.runs.run import Run

_SIDES = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_MAX_AP_LOSS = 0.005
_NO_TEST_IMAGES = (
    "--int8: needs validation images, to check that AP does not fall: the data set of the run has none "
    "(data.test.annotations, data.holdout)"
)


def _locks(model: Path, **_: Any) -> Iterator[AbstractContextManager[None]]:
    if model.parent.is_dir():
        yield lock_file(model, option="MODEL")


@locking(_locks)
def export(
    run: Annotated[
        str,
        Parameter(
            help="Folder of the run; or a detector of a library, torchvision:NAME, torchvision:NAME@FILE or "
            "transformers:NAME."
        ),
    ],
    model: Annotated[
        Path,
        Parameter(
            help="File to write: .onnx for ONNX Runtime, .xml for OpenVINO (beside it a .bin with the weights), .pt2 "
            "for torch.export."
        ),
    ],
    /,
    *overrides: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="Fields of the sections predict and data.read to set, as --predict.FIELD VALUE and --data.read.FIELD "
            "VALUE, in place of the run's.",
        ),
    ],
    sides: Annotated[
        str | None,
        Parameter(
            help="Width and height, such as 512x512, that all images for the graph have; larger ones are searched in "
            "windows of these sides, smaller ones padded to them.",
            show_default=default("any sides"),
        ),
    ] = None,
    half: Annotated[bool, flag("Store weights in half precision: half the file.")] = False,
    int8: Annotated[
        Path | None,
        Parameter(
            help="Data set to calibrate 8-bit integers on, such as that of training. The file is written only if AP on "
            f"the validation images of the run falls by at most {_MAX_AP_LOSS}. {ANNOTATIONS_HELP}"
        ),
    ] = None,
    images: Images = None,
    checkpoint: Checkpoint = "best",
    json: Json = False,
) -> None:
    """Write the detector of a run as one graph, to where it is to run.

    Classes, levels, ranges and merging are in the file, too: sniper.runtime and `sniper predict MODEL` search whole
    images with it, without torch.
    """
    started = time.monotonic()
    from sniper.inference.exporting import ExportOptions, check_focus, check_path, export_model, write
    from sniper.models.graphs import check_exportable

    paths, options = split_overrides(overrides, sections=("predict", "data.read"))
    if paths:
        raise ConfigError(f"{paths[0]}: is one argument too many; usage: sniper export RUN MODEL")
    if images is not None and int8 is None:
        raise ConfigError("--images requires --int8")
    check_parent(model)
    chosen = ExportOptions(sides=_parse_sides(sides), half=half)
    check_path(model, chosen)
    if int8 is not None and half:
        raise ConfigError("--half and --int8 exclude each other: integers take a quarter of the file")
    if int8 is not None and model.suffix == ".pt2":
        raise ConfigError("--int8: is of .onnx and .xml files, not of .pt2")
    loaded, opened = _load(run, options, checkpoint=checkpoint, has_scores=int8 is not None)
    if opened is not None:
        print_progress(describe_weights(opened, int(loaded.weights.parent.name)))
    check_exportable(loaded.model.spec)
    check_focus(loaded.spec.predict)
    print_progress("exporting, and comparing with torch")
    scores: dict[str, Any] = {}
    if int8 is None:
        spec = export_model(loaded, model, options=chosen)
    else:
        exported, scores = _quantize(loaded, opened, int8, images=images, options=chosen)
        write(model, exported)
        spec = exported.spec
    result = {
        "run" if opened is not None else "detector": run,
        "model": spec.model,
        "sides": None if spec.sides is None else list(spec.sides),
        "multiple": spec.multiple,
        "half": half,
        "int8": spec.quantized,
        **scores,
        "bytes": _num_bytes(model),
        "seconds": round(time.monotonic() - started, 3),
        "output": str(model),
    }
    print_result(result if json else _summary(result), is_json=json)


def _parse_sides(text: str | None) -> "Sides | None":
    from sniper.geometry.boxes import Sides

    if text is None:
        return None
    match = _SIDES.fullmatch(text)
    if match is None:
        raise ConfigError(f"--sides {text}: expected width x height in pixels, such as 512x512")
    return Sides(int(match[1]), int(match[2]))


def _load(
    name: str, overrides: Mapping[str, str], *, checkpoint: str, has_scores: bool
) -> "tuple[LoadedModel, Run | None]":
    """Load the model of a run or of a library; `has_scores` is whether it will be scored."""
    from sniper.config.experiment import ExperimentSpec
    from sniper.config.loading import load_experiment, merge_experiment
    from sniper.files import expand_path
    from sniper.inference.detector import is_library
    from sniper.inference.exporting import check_focus
    from sniper.inference.loading import load_library_detector, load_model
    from sniper.models.graphs import check_exportable
    from sniper.runs.run import Run

    if is_library(name):
        if checkpoint != "best":
            raise ConfigError(f"--checkpoint: is of a run, and {name} is none")
        spec = merge_experiment(ExperimentSpec(), None, overrides=overrides)
        return load_library_detector(name, "cpu", spec=spec)[1], None
    opened = Run.open(expand_path(name))
    spec = merge_experiment(load_experiment(opened.config_path), None, overrides=overrides)
    check_exportable(spec.model)  # before the weights are read
    check_focus(spec.predict)
    if has_scores:
        from sniper.pipeline import has_test_images

        if not has_test_images(spec):
            raise ExportError(_NO_TEST_IMAGES)
    return load_model(opened, "cpu", spec=spec, checkpoint=parse_checkpoint(checkpoint)), opened


def _quantize(
    loaded: "LoadedModel",
    run: "Run | None",
    calibration: Path,
    *,
    images: Path | None,
    options: "ExportOptions",
) -> "tuple[ExportedModel, dict[str, Any]]":
    """Return a detector of 8-bit integers, and its AP beside that in float32.

    Raises:
        ExportError: if AP falls by more than it may, or cannot be measured.
    """
    from sniper.inference.exporting import detector_of, measure_ap, quantize, to_onnx

    if run is None:
        raise ExportError(_NO_TEST_IMAGES)
    truth = load_split(loaded.spec, "test")
    data = load_images(calibration, images=images, data=loaded.spec.data)
    exported = to_onnx(loaded, options=options)
    detector = detector_of(exported)
    match = match_classes(detector, truth, run=run.folder)
    print_progress(f"calibrating on the windows of {counted(min(len(data), 100), 'image')}")
    quantized = quantize(exported, data, detector=detector)
    print_progress(f"measuring AP on {counted(len(truth), 'validation image')}, in float32 and in 8 bits")
    before = measure_ap(detector, truth, match=match)
    after = measure_ap(detector_of(quantized), truth, match=match)
    if before - after > _MAX_AP_LOSS:
        raise ExportError(
            f"--int8: AP falls from {before:.4f} to {after:.4f} on the validation images, more than {_MAX_AP_LOSS}; "
            "nothing was written"
        )
    return quantized, {"ap_float": round(before, 5), "ap_int8": round(after, 5)}


def _num_bytes(model: Path) -> int:
    files = [model, model.with_suffix(".bin")] if model.suffix == ".xml" else [model]
    return sum(path.stat().st_size for path in files)


def _summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result as lines for people."""
    lines = {name: result[name] for name in ("run", "detector", "model") if name in result}
    multiple = result["multiple"]
    lines["images"] = (
        f"any sides, padded to multiples of {multiple} pixels"
        if result["sides"] is None
        else "{}x{} pixels".format(*result["sides"])
    )
    if result["int8"]:
        lines["AP"] = f"{result['ap_int8']:.4f} in 8 bits, {result['ap_float']:.4f} in float32"
    lines["written"] = f"{result['output']}, {result['bytes'] / 1e6:.1f} MB"
    lines["next"] = f"sniper predict {result['output']} IMAGES"
    return lines
