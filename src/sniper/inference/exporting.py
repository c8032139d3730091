"""Write a detector as one file for ONNX Runtime, OpenVINO or `torch.export`; `exported` reads it.

OpenVINO's file is converted from ONNX. Every graph is compared with torch before it is written: exporters may lose what
a detector computes without an error.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8

from sniper.config.experiment import ExperimentSpec, FocusSpec, PredictSpec
from sniper.data.datasets import Dataset
from sniper.data.datasets.categories import CategoryMatch
from sniper.errors import ExportError
from sniper.evaluation.coco import score
from sniper.evaluation.pair import GroundTruth
from sniper.files import sha256, sync_folder, temporary_folder
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.inference.detector import EXPORTED_SUFFIXES, Detector
from sniper.inference.exported import (
    INPUTS,
    METADATA,
    OUTPUTS,
    SUFFIXES,
    VERSION,
    ExportedClass,
    ExportedFile,
    ExportedSpec,
    is_exported,
    open_graph,
    pad,
)
from sniper.inference.loading import LoadedModel, load_model
from sniper.inference.merging import merge_method
from sniper.inference.validation import spread, validate
from sniper.models.graphs import DetectionGraph, build_graph, check_exportable
from sniper.runs.run import CheckpointChoice, Run

_OPSET = 20
_SAMPLE_CELLS = ((5, 4), (3, 6))  # width and height of the images that graphs are traced and compared with
_MAX_BOX_ERROR = 0.5  # pixels
_MAX_SCORE_ERROR = 0.01
_MIN_SHARE_EQUAL = 0.95  # of detections; rounding may decide between two that overlap
_NUM_COMPARED = 100  # best detections of each image

MAX_CALIBRATION_IMAGES = 100
"""Images whose windows 8-bit integers are calibrated with, spread evenly over the data set."""

_MAX_CALIBRATION_WINDOWS = 300
_MIN_HALVED = 16  # values; smaller tensors save nothing


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a detector is written.

    Attributes:
        sides: width and height that all images for the graph have, pixels; None for any.
        half: whether weights are stored in half precision.
    """

    sides: Sides | None = None
    half: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedModel:
    """A detector as ONNX, in memory.

    Attributes:
        onnx: the content of an ONNX file.
        spec: what the search needs beside it.
    """

    onnx: bytes
    spec: ExportedSpec


def export_run(
    run: Run,
    path: Path,
    *,
    options: ExportOptions = ExportOptions(),
    spec: ExperimentSpec | None = None,
    checkpoint: CheckpointChoice = "best",
) -> ExportedSpec:
    """Write the detector of a run.

    Args:
        run: the run.
        path: file to write; its suffix says which kind.
        options: how it is written.
        spec: an experiment to use instead of the run's, with the same model.
        checkpoint: see `Detector.load`.

    Raises:
        ExportError: if the detector, or with such options, cannot be exported.
    """
    return export_model(load_model(run, "cpu", spec=spec, checkpoint=checkpoint), path, options=options)


def load_engine(
    run: Run,
    engine: Literal["onnx", "openvino"],
    *,
    spec: ExperimentSpec | None = None,
    device: str | None = None,
    checkpoint: CheckpointChoice = "best",
    on_export: Callable[[Path], None] = lambda _: None,
) -> Detector:
    """Load the detector of a run for an engine other than torch, which is exported into the folder of the run first.

    Args:
        run: the run.
        engine: what runs the detector.
        spec: an experiment to use instead of the run's, with the same model.
        device: see `load_exported`.
        checkpoint: see `Detector.load`.
        on_export: called with the file before it is written, which takes a minute; another time it is there.

    Raises:
        ExportError: if the detector cannot be exported, or the engine is not installed.
    """
    loaded = load_model(run, "cpu", spec=spec, checkpoint=checkpoint)
    described = json.dumps([VERSION, sha256(loaded.weights), asdict(loaded.model.spec)], sort_keys=True)
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    path = run.exported_folder / f"{key}{SUFFIXES[engine]}"
    check_focus(loaded.spec.predict)
    if not path.exists():
        check_path(path, ExportOptions())
        check_exportable(loaded.model.spec)
        on_export(path)
        path.parent.mkdir(exist_ok=True)
        export_model(loaded, path)
    predict = loaded.spec.predict
    if loaded.calibration is not None:
        predict = loaded.calibration.resolve(predict)
    return ExportedFile.open(path, device=device).detector(predict=predict, data=loaded.spec.data)


def export_model(
    loaded: LoadedModel, path: Path, *, options: ExportOptions = ExportOptions()
) -> ExportedSpec:
    """Write a detector; see `export_run`."""
    check_path(path, options)
    graph, spec = _build(loaded, options)
    if path.suffix == ".pt2":
        _write_torch(path, _trace(graph, spec), spec)
    else:
        write(path, _to_onnx(graph, spec), half=options.half)
    return spec


def check_path(path: Path, options: ExportOptions) -> None:
    """Check that a file can be written with some options.

    Raises:
        ExportError: if its suffix is of no format, or not with the options; a package for it is missing; or it would
            replace a file that was not written by `sniper export`.
    """
    if path.suffix not in EXPORTED_SUFFIXES:
        raise ExportError(
            f"{path}: expected a name that ends with .onnx (ONNX Runtime), .xml (OpenVINO) or .pt2 (torch.export)"
        )
    if path.is_dir():
        raise ExportError(f"{path}: expected a file to write, this is a folder")
    if path.suffix == ".pt2" and options.half:
        raise ExportError("--half: weights in half precision are of .onnx and .xml files, not of .pt2")
    packages = {".onnx": ("onnx", "onnxruntime", "onnxscript"), ".pt2": ()}
    for package in packages.get(path.suffix, ("onnx", "onnxruntime", "onnxscript", "openvino")):
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise ExportError(
                f"{path}: needs {error.name}, which is not installed (pip install 'sniper-det[onnx,openvino]')"
            ) from error
    _check_replaceable(path)


def _check_replaceable(path: Path) -> None:
    """Check that a file to be written, or its weights beside it, replaces none but an earlier export."""
    if path.exists():
        if is_exported(path):
            return
        other = path
    else:
        other = path.with_suffix(".bin")
        if path.suffix != ".xml" or not other.exists():
            return
    raise ExportError(
        f"{other}: was not written by sniper export, or cannot be read any more, and would be replaced; choose another "
        "name, or remove it"
    )


def to_onnx(loaded: LoadedModel, *, options: ExportOptions = ExportOptions()) -> ExportedModel:
    """Return a detector as ONNX, compared with torch."""
    return _to_onnx(*_build(loaded, options))


def _build(loaded: LoadedModel, options: ExportOptions) -> tuple[DetectionGraph, ExportedSpec]:
    check_exportable(loaded.model.spec)
    check_focus(loaded.spec.predict)
    graph = build_graph(loaded.model.float().eval().for_inference()).eval()
    spec = ExportedSpec(
        version=VERSION,
        model=_describe(loaded),
        weights=sha256(loaded.weights),
        classes=tuple(
            ExportedClass(category_id=each.category_id, name=each.name) for each in loaded.categories
        ),
        predict=_resolved(loaded),
        read=loaded.spec.data.read,
        min_score=None if loaded.calibration is None else loaded.calibration.min_score,
        multiple=graph.multiple,
        min_side=graph.min_side,
        sides=options.sides,
        quantized=False,
    )
    _check_sides(spec)
    return graph, spec


def _describe(loaded: LoadedModel) -> str:
    model = loaded.model.spec
    parts = [model.kind, model.name]
    if not model.has_own_backbone:
        parts += [model.backbone.name, model.backbone.neck]
    return " ".join(part for part in parts if part)


def _resolved(loaded: LoadedModel) -> PredictSpec:
    """Return how to search, with what was chosen on validation images, in the precision that an engine chooses."""
    spec = loaded.spec.predict
    if loaded.calibration is not None:
        spec = loaded.calibration.resolve(spec)
    return replace(spec, merge=merge_method(spec), precision="auto")


def check_focus(predict: PredictSpec) -> None:
    """Check that a search needs detections alone: a graph has no focus head.

    Raises:
        ExportError: if its focus is by the head.
    """
    if isinstance(predict.focus, FocusSpec) and predict.focus.cues == "head":
        raise ExportError(
            "predict.focus: the focus head is no part of an exported graph; choose by detections "
            "(sniper focus RUN --cues detections), or search everything (--predict.focus null)"
        )


def _check_sides(spec: ExportedSpec) -> None:
    if spec.sides is None:
        return
    for side in spec.sides:
        if side % spec.multiple or side < spec.min_side:
            least = f", at least {spec.min_side}" if spec.min_side else ""
            raise ExportError(
                f"--sides {spec.sides[0]}x{spec.sides[1]}: expected multiples of {spec.multiple} pixels for this "
                f"detector{least}"
            )


def _samples(spec: ExportedSpec) -> Iterator[tuple[UInt8[np.ndarray, "1 3 h w"], Sides]]:
    """Iterate images of noise, as graphs take them, and their sides before padding."""
    generator = np.random.default_rng(0)
    cell = max(spec.multiple, spec.min_side)
    for columns, rows in _SAMPLE_CELLS if spec.sides is None else _SAMPLE_CELLS[:1]:
        sides = Sides(columns * cell - 9, rows * cell - 21) if spec.sides is None else Sides(*spec.sides)
        coarse = generator.integers(0, 256, (rows * 8, columns * 8, 3), dtype=np.uint8)
        yield pad(_enlarge(coarse, sides), spec), sides


def _enlarge(pixels: UInt8[np.ndarray, "_ _ 3"], sides: Sides) -> UInt8[np.ndarray, "h w 3"]:
    rows = np.arange(sides.height) * len(pixels) // sides.height
    columns = np.arange(sides.width) * pixels.shape[1] // sides.width
    return pixels[rows][:, columns]


def _trace(graph: DetectionGraph, spec: ExportedSpec) -> Any:
    """Return the program of `torch.export`."""
    image, sides = next(iter(_samples(spec)))
    shapes = None
    if spec.sides is None:
        least = max(1, -(-spec.min_side // spec.multiple))
        height, width = (spec.multiple * torch.export.Dim(name, min=least) for name in ("rows", "columns"))
        shapes = ({2: height, 3: width}, None)
    try:
        with _quietly():
            return torch.export.export(
                graph,
                (torch.from_numpy(image), torch.tensor(sides)),
                dynamic_shapes=shapes,
                strict=False,
            )
    except Exception as error:  # torch raises unrelated exceptions
        raise ExportError(_explain(error, spec)) from error


def _explain(error: Exception, spec: ExportedSpec) -> str:
    reason = _one_line(error)
    hint = "; fixed sides (--sides 640x640) may work" if spec.sides is None else ""
    return f"{spec.model}: torch cannot export this detector ({type(error).__name__}: {reason}){hint}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _to_onnx(graph: DetectionGraph, spec: ExportedSpec) -> ExportedModel:
    program = _trace(graph, spec)
    try:
        with _quietly():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_OPSET,
                input_names=INPUTS,
                output_names=OUTPUTS,
                custom_translation_table=_translations(graph.max_kept),
                verbose=False,
            )
    except Exception as error:  # torch raises unrelated exceptions
        raise ExportError(_explain(error, spec)) from error
    assert exported is not None
    model = exported.model_proto
    content = _with_metadata(model, spec).SerializeToString()
    result = ExportedModel(onnx=content, spec=spec)
    _compare(graph, result)
    return result


def _translations(max_kept: int | None) -> dict[Any, Callable[..., Any]]:
    """Return ONNX for operators of torch: NMS that stops at its limit, and a check that torch has no ONNX for."""
    from onnxscript import opset20

    op: Any = opset20  # its annotations take no constants

    # The exporter reads the annotations of translations to tell inputs from attributes.
    def suppress(boxes, scores, iou_threshold: float):  # type: ignore[no-untyped-def]
        limit = op.Constant(value_int=max_kept)
        selected = op.NonMaxSuppression(
            op.Unsqueeze(boxes, [0]), op.Unsqueeze(scores, [0, 1]), limit, iou_threshold
        )
        return op.Reshape(op.Slice(selected, [2], [3], [1]), [-1])

    def all_true(values):  # type: ignore[no-untyped-def]
        return op.Cast(op.ReduceMin(op.Cast(values, to=6), keepdims=0), to=9)  # INT32, BOOL

    table: dict[Any, Callable[..., Any]] = {torch.ops.aten._is_all_true.default: all_true}
    return table if max_kept is None else table | {torch.ops.torchvision.nms.default: suppress}


def _with_metadata(model: Any, spec: ExportedSpec) -> Any:
    """Return an ONNX model with the text in place of the metadata that it has."""
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA: spec.to_json()})
    return model


def _compare(graph: DetectionGraph, exported: ExportedModel) -> None:
    """Compare an ONNX graph with torch on images of noise.

    Raises:
        ExportError: if they differ.
    """
    opened = open_graph(exported.onnx)
    for image, sides in _samples(exported.spec):
        with torch.inference_mode():
            expected = [output.numpy() for output in graph(torch.from_numpy(image), torch.tensor(sides))]
        try:
            found = opened(image, np.array(sides, dtype=np.int64))
        except Exception as error:  # ONNX Runtime raises unrelated exceptions
            raise ExportError(_explain(error, exported.spec)) from error
        share = share_equal(_to_detections(*expected), _to_detections(*found))
        if share < _MIN_SHARE_EQUAL:
            hint = "; fixed sides (--sides 640x640) may work" if exported.spec.sides is None else ""
            raise ExportError(
                f"{exported.spec.model}: the exported graph finds {share:.0%} of the detections of torch in an image "
                f"of {sides.width}x{sides.height} pixels{hint}"
            )


def share_equal(expected: Detections, found: Detections) -> float:
    """Return which share of the best detections others have, too, with the same label, score and box; 1 without any."""
    best = expected[np.argsort(-expected.scores, kind="stable")[:_NUM_COMPARED]]
    if not len(best):
        return 1.0
    if not len(found):
        return 0.0
    is_same = (
        (np.abs(best.boxes[:, None] - found.boxes[None]).max(axis=2) <= _MAX_BOX_ERROR)
        & (np.abs(best.scores[:, None] - found.scores[None]) <= _MAX_SCORE_ERROR)
        & (best.labels[:, None] == found.labels[None])
    )  # (n, m)
    return float(is_same.any(axis=1).mean())


def _to_detections(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Detections:
    return Detections(
        boxes=boxes.astype(np.float64), scores=scores.astype(np.float64), labels=labels.astype(np.int64)
    )


def quantize(exported: ExportedModel, images: Dataset, *, detector: Detector) -> ExportedModel:
    """Return a detector that computes most convolutions with 8-bit integers.

    Ranges of values are those in the windows of some images, at all levels (post-training calibration). The first
    convolution, depthwise ones and the outputs of heads stay in float32: they cost little time and most accuracy.

    Args:
        exported: in float32.
        images: without regard to their boxes.
        detector: whose search makes the windows.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    windows = iter(_windows_of(images, detector, exported.spec))

    class Windows(CalibrationDataReader):  # type: ignore[misc]
        """The windows, as the calibration of ONNX Runtime takes them."""

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(windows, None)

    spec = replace(exported.spec, quantized=True)
    with temporary_folder(Path.cwd()) as folder, _quietly():
        source, target = folder / "float.onnx", folder / "integer.onnx"
        source.write_bytes(exported.onnx)
        quantize_static(
            source,
            target,
            Windows(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=_sensitive(onnx.load_from_string(exported.onnx)),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(target)
    return ExportedModel(onnx=_with_metadata(model, spec).SerializeToString(), spec=spec)


def _sensitive(model: Any) -> list[str]:
    """Return the names of convolutions that stay in float32; see `quantize`."""
    nodes = list(model.graph.node)
    consumers = {name: node.op_type for node in nodes for name in node.input}
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    return [
        node.name
        for index, node in enumerate(convolutions)
        if index == 0
        or any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
        or consumers.get(node.output[0]) in ("Transpose", "Reshape")  # an output for each place of a map
    ]


def measure_ap(detector: Detector, images: Dataset, *, match: CategoryMatch) -> float:
    """Return the COCO AP of a detector on images.

    Args:
        detector: with a method to merge.
        images: with their objects.
        match: of the detector's classes with the categories of the images.
    """
    validated = validate(detector, images, truth=GroundTruth.of(images), match=match, step=0)
    return score(validated.pair).ap


def _windows_of(images: Dataset, detector: Detector, spec: ExportedSpec) -> list[dict[str, np.ndarray]]:
    """Return windows of some images as inputs of the graph."""
    found: list[dict[str, np.ndarray]] = []

    def record(arrays: Sequence[np.ndarray]) -> list[Detections]:
        for pixels in arrays:
            height, width = pixels.shape[:2]
            sides = np.array([width, height], dtype=np.int64)
            found.append(dict(zip(INPUTS, (pad(pixels, spec), sides), strict=True)))
        return [Detections.empty() for _ in arrays]

    indices = spread(len(images), count=MAX_CALIBRATION_IMAGES)
    for _ in replace(detector, detect=record, device=None, detect_masks=None).search(
        images[index] for index in indices
    ):
        pass
    return [found[index] for index in spread(len(found), count=_MAX_CALIBRATION_WINDOWS)]


def detector_of(exported: ExportedModel) -> Detector:
    """Return a detector that ONNX Runtime runs."""
    return ExportedFile(graph=open_graph(exported.onnx), spec=exported.spec).detector()


def write(path: Path, exported: ExportedModel, *, half: bool = False) -> None:
    """Write a detector as ONNX or for OpenVINO, complete or not at all.

    Args:
        path: file to write, `.onnx` or `.xml`; beside the latter a file `.bin` has the weights.
        exported: the detector.
        half: whether weights are stored in half precision; they are computed with as the engine chooses.
    """
    with temporary_folder(path.parent) as folder:
        source = folder / "model.onnx"
        source.write_bytes(_halved(exported.onnx) if half and path.suffix == ".onnx" else exported.onnx)
        if path.suffix == ".onnx":
            source.replace(path)
        else:
            _write_openvino(source, path, exported.spec, folder=folder, half=half)
        sync_folder(path.parent)


def _halved(content: bytes) -> bytes:
    """Return an ONNX model whose weights are stored in half precision, and cast when it is loaded."""
    import onnx

    model = onnx.load_from_string(content)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < _MIN_HALVED:
            continue
        name, values = tensor.name, onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def _write_openvino(source: Path, path: Path, spec: ExportedSpec, *, folder: Path, half: bool) -> None:
    import openvino

    try:
        with _quietly():
            model = openvino.convert_model(source)
    except RuntimeError as error:
        lines = [line.strip("- ") for line in str(error).splitlines() if "No conversion rule" in line]
        raise ExportError(
            f"{spec.model}: OpenVINO cannot run this detector ({'; '.join(lines) or _one_line(error)}); export it as "
            ".onnx"
        ) from error
    model.set_rt_info(spec.to_json(), [METADATA])
    unfinished = folder / path.name
    openvino.save_model(model, unfinished, compress_to_fp16=half)
    for suffix in (".bin", ".xml"):  # the second names the first
        unfinished.with_suffix(suffix).replace(path.with_suffix(suffix))


def _write_torch(path: Path, program: Any, spec: ExportedSpec) -> None:
    with temporary_folder(path.parent) as folder:
        unfinished = folder / path.name
        try:
            with _quietly():
                torch.export.save(program, unfinished, extra_files={f"{METADATA}.json": spec.to_json()})
        except OSError:
            raise
        except Exception as error:  # torch raises unrelated exceptions
            raise ExportError(_explain(error, spec)) from error
        unfinished.replace(path)
        sync_folder(path.parent)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide what exporters print and warn of: operators of other packages, and parts of torch that will change."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
