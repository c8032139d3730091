"""Detectors that `sniper export` has written, run by ONNX Runtime or OpenVINO without torch, or by torch.

A file has one graph, from the pixels of a window to its detections, and a JSON text with all that a search needs beside
it: classes, levels with their ranges, merging, how images are read. Search and merging are those of every detector.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from annotated_types import Ge
from jaxtyping import Int64, UInt8
from pydantic import PositiveInt

from sniper.config.experiment import ExperimentSpec, PredictSpec
from sniper.data.datasets import Category
from sniper.data.spec import DataSpec, ReadSpec
from sniper.errors import ConfigError, ExportError, SniperError
from sniper.files import check_regular, open_regular
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.inference.detector import EXPORTED_SUFFIXES, Detector, with_predict
from sniper.inference.focus import check_levels
from sniper.inference.openvino_parts import GraphParts
from sniper.models.spec import Precision
from sniper.specs import Fraction, parse_json, spec_dataclass

VERSION = 1
METADATA = "sniper"
"""Key of the JSON text in a file: of the metadata of ONNX, of `rt_info` of OpenVINO, of the extra files of torch."""

Engine = Literal["torch", "onnx", "openvino"]
"""What runs a detector: torch, ONNX Runtime or OpenVINO."""

SUFFIXES: Mapping[str, str] = {"onnx": ".onnx", "openvino": ".xml"}
"""What the name of a file of an engine ends with."""

INPUTS, OUTPUTS = ("image", "sides"), ("boxes", "scores", "labels")
"""Names in the graph."""

_NUM_START_BYTES = 4096  # in which an XML file has its first element
_FREQUENT = 16  # images of a shape after which OpenVINO compiles the graph for that shape
_MAX_SHAPES = 4  # for which it is compiled; each has the weights in memory once more

_OPENVINO_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


@spec_dataclass
class ExportedClass:
    """A class of a detector.

    Attributes:
        category_id: as in the data set.
        name: human-readable.
    """

    category_id: int | str
    name: str


@spec_dataclass
class ExportedSpec:
    """What a search needs beside the graph.

    Attributes:
        version: of this text.
        model: the architecture, for people.
        weights: SHA-256 of the weights file that the graph was made from.
        classes: by label.
        predict: levels, windows and merging.
        read: how images become pixels.
        min_score: score from which detections are shown; None if it is unknown.
        multiple: of which the sides of an image for the graph are, pixels.
        min_side: which they have at least, pixels.
        sides: width and height of an image for the graph, if they are fixed.
        quantized: whether it computes with 8-bit integers.
    """

    version: PositiveInt
    model: str
    weights: str
    classes: tuple[ExportedClass, ...]
    predict: PredictSpec
    read: ReadSpec
    min_score: Fraction | None
    multiple: PositiveInt
    min_side: Annotated[int, Ge(0)]
    sides: tuple[PositiveInt, PositiveInt] | None
    quantized: bool

    def to_json(self) -> str:
        """Return the text that is in a file."""
        return json.dumps(asdict(self))

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes by label."""
        return tuple(Category(category_id=each.category_id, name=each.name) for each in self.classes)


@runtime_checkable
class Graph(Protocol):
    """A graph that has been read, and the text beside it."""

    metadata: str | None

    def prepare(self, precision: Precision) -> None:
        """Get ready to detect, in some precision.

        Raises:
            ConfigError: if the engine does not have it.
        """

    def __call__(
        self, image: UInt8[np.ndarray, "1 3 h w"], sides: Int64[np.ndarray, "2"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return boxes, scores and labels of an image, whose sides before padding are width and height."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedFile:
    """An exported detector that has been read.

    Attributes:
        graph: that detects in windows.
        spec: what a search needs beside it.
    """

    graph: Graph
    spec: ExportedSpec

    @classmethod
    def open(cls, path: Path, *, device: str | None = None) -> "ExportedFile":
        """Read a file; see `load_exported`."""
        if path.suffix not in EXPORTED_SUFFIXES:
            raise ExportError(f"{path}: expected a file that ends with {', '.join(EXPORTED_SUFFIXES)}")
        check_regular(path)
        graph = _open(path, device=device or "cpu")
        return cls(graph=graph, spec=_read_metadata(graph.metadata, path=path))

    @property
    def experiment(self) -> ExperimentSpec:
        """How to search, and how images are read, beside the defaults of everything else."""
        return ExperimentSpec(predict=self.spec.predict, data=DataSpec(read=self.spec.read))

    def detector(self, *, predict: PredictSpec | None = None, data: DataSpec | None = None) -> Detector:
        """Return a detector of images of any size.

        Args:
            predict: how to search, in place of what the file says.
            data: how images are read, likewise.

        Raises:
            ConfigError: if the engine does not have `predict.precision`, or a focus is set for one level.
        """
        spec = self.spec
        predict = predict or spec.predict
        check_levels(predict)
        self.graph.prepare(predict.precision)
        return Detector(
            detect=_InWindows(self.graph, spec),
            spec=predict,
            categories=spec.categories,
            device=None,
            min_score=spec.min_score,
            data=data or DataSpec(read=spec.read),
            window_sides=None if spec.sides is None else Sides(*spec.sides),
        )


def load_exported(
    path: Path, *, device: str | None = None, predict: Mapping[str, Any] | None = None
) -> Detector:
    """Load a detector that `sniper export` has written.

    Args:
        path: an ONNX file for ONNX Runtime; an XML file, with its BIN file beside it, for OpenVINO; or a PT2 file for
            torch.
        device: `cpu` or `cuda`, or of OpenVINO another name of its own, such as `gpu`; by default the CPU. The number
            of threads is that of the environment variable OMP_NUM_THREADS, if it is set.
        predict: other values of fields of `predict`; see `Detector.load`. OpenVINO alone has other values of
            `precision` than that of the file.

    Raises:
        ExportError: if it cannot be read, or was not written by `sniper export`; or its engine is not installed, or
            has no such device.
        ConfigError: if a field of `predict` cannot be used.
    """
    opened = ExportedFile.open(path, device=device)
    return opened.detector(predict=with_predict(opened.experiment, predict).predict)


def pad(pixels: UInt8[np.ndarray, "h w 3"], spec: ExportedSpec) -> UInt8[np.ndarray, "1 3 _ _"]:
    """Pad a window with black, right and below, to sides that its graph takes."""
    height, width = pixels.shape[:2]
    if spec.sides is None:
        sides = Sides(
            *(-(-max(side, spec.min_side) // spec.multiple) * spec.multiple for side in (width, height))
        )
    else:
        sides = Sides(*spec.sides)
    padded = np.zeros((1, 3, sides.height, sides.width), dtype=np.uint8)
    padded[0, :, :height, :width] = pixels.transpose(2, 0, 1)
    return padded


class _InWindows:
    """A graph as a function of (h, w, 3) arrays, which takes one after the other."""

    def __init__(self, graph: Graph, spec: ExportedSpec) -> None:
        self._graph, self._spec = graph, spec

    def __call__(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[Detections]:
        return [self._detect(image) for image in images]

    def _detect(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Detections:
        height, width = pixels.shape[:2]
        boxes, scores, labels = self._graph(
            pad(pixels, self._spec), np.array([width, height], dtype=np.int64)
        )
        return Detections(
            boxes=boxes.astype(np.float64), scores=scores.astype(np.float64), labels=labels.astype(np.int64)
        )


def open_graph(onnx: bytes) -> Graph:
    """Open the content of an ONNX file in ONNX Runtime, on the CPU."""
    return _OnnxGraph(onnx, device="cpu")


class _OnnxGraph:
    """A graph in ONNX Runtime."""

    def __init__(self, source: Path | bytes, *, device: str) -> None:
        import onnxruntime

        known = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
        provider = known.get(device.partition(":")[0])
        if provider not in onnxruntime.get_available_providers():
            raise ExportError(
                f"device {device}: this ONNX Runtime has {', '.join(onnxruntime.get_available_providers())}"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, too
        options.intra_op_num_threads = _num_threads() or 0
        self._session = onnxruntime.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=[provider]
        )
        self.metadata = self._session.get_modelmeta().custom_metadata_map.get(METADATA)

    def prepare(self, precision: Precision) -> None:
        """Check the precision."""
        _check_precision(precision)

    def __call__(
        self, image: UInt8[np.ndarray, "1 3 h w"], sides: Int64[np.ndarray, "2"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        boxes, scores, labels = self._session.run(OUTPUTS, dict(zip(INPUTS, (image, sides), strict=True)))
        return boxes, scores, labels


class _OpenvinoGraph:
    """A graph in OpenVINO."""

    def __init__(self, path: Path, *, device: str) -> None:
        import openvino

        self._core, self._device = openvino.Core(), device.upper()
        devices = self._core.available_devices
        if not any(name.partition(".")[0] == self._device.partition(".")[0] for name in devices):
            raise ExportError(f"device {device}: this OpenVINO has {', '.join(devices)}")
        self._model = self._core.read_model(path)
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._compiled_for: dict[tuple[int, ...], Any] = {}
        has_text = self._model.has_rt_info([METADATA])
        self.metadata = str(self._model.get_rt_info([METADATA]).value) if has_text else None

    def prepare(self, precision: Precision) -> None:
        """Compile the graph."""
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if precision != "auto":
            options["INFERENCE_PRECISION_HINT"] = _OPENVINO_PRECISIONS[precision]
        threads = _num_threads()
        if self._device == "CPU" and threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self._options = options
        # bfloat16 and float16 are too coarse for coordinates.
        is_whole = precision == "fp32" or self._device != "CPU"
        self._parts = None if is_whole else GraphParts.of(self._model)
        self._compiled = self._compile()

    def __call__(
        self, image: UInt8[np.ndarray, "1 3 h w"], sides: Int64[np.ndarray, "2"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        outputs = self._choose(image.shape)(dict(zip(INPUTS, (image, sides), strict=True)))
        boxes, scores, labels = (outputs[name] for name in OUTPUTS)
        return boxes, scores, labels

    def _choose(self, shape: tuple[int, ...]) -> Any:
        """Return the graph for images of a shape, which is compiled for this shape alone if that is frequent.

        It is a quarter faster (docs/benchmarks.md), and takes as long to compile as some dozens of windows.
        """
        if shape in self._compiled_for:
            return self._compiled_for[shape]
        self._counts[shape] += 1
        is_frequent = self._counts[shape] > _FREQUENT and self._model.is_dynamic()
        if not is_frequent or len(self._compiled_for) == _MAX_SHAPES:
            return self._compiled
        self._compiled_for[shape] = self._compile({INPUTS[0]: shape})
        return self._compiled_for[shape]

    def _compile(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
        """Compile the graph, for inputs of fixed shapes if they are given."""
        if self._parts is not None:
            parts = self._parts if shapes is None else self._parts.reshaped(shapes)
            return parts.compile(self._core, self._device, self._options)
        model = self._model
        if shapes is not None:
            model = model.clone()
            model.reshape(dict(shapes))
        return self._core.compile_model(model, self._device, self._options)


class _TorchGraph:
    """A graph of `torch.export`."""

    def __init__(self, path: Path, *, device: str) -> None:
        import torch
        import torchvision  # noqa: F401 - its operators are in the graph

        if device != "cpu":
            raise ExportError(
                f"device {device}: a graph of torch.export is for the CPU; load the run instead"
            )
        extra: dict[str, str] = {f"{METADATA}.json": ""}
        self._module = torch.export.load(path, extra_files=extra).module()
        self.metadata = extra[f"{METADATA}.json"] or None

    def prepare(self, precision: Precision) -> None:
        """Check the precision."""
        _check_precision(precision)

    def __call__(
        self, image: UInt8[np.ndarray, "1 3 h w"], sides: Int64[np.ndarray, "2"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode():
            boxes, scores, labels = self._module(torch.from_numpy(image), torch.from_numpy(sides))
        return boxes.numpy(), scores.numpy(), labels.numpy()


def is_exported(path: Path) -> bool:
    """Check whether a file was written by `sniper export`, of whatever version."""
    check_regular(path)
    try:
        return _open(path, device="cpu").metadata is not None
    except ExportError:
        return False


_PACKAGES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}


def _check_precision(precision: Precision) -> None:
    if precision not in ("auto", "fp32"):
        raise ConfigError(
            f"predict.precision: ONNX Runtime and torch.export compute in the precision that was exported, not in "
            f"{precision}; OpenVINO has others"
        )


def _check_xml(path: Path) -> None:
    """Check that a file may be OpenVINO's, which otherwise tries all of its readers, each with messages."""
    with open_regular(path) as file:
        if b"<net" not in file.read(_NUM_START_BYTES):
            raise ExportError(
                f"{path}: is no OpenVINO model; expected the .xml of one that sniper export has written"
            )


def _open(path: Path, *, device: str) -> Graph:
    try:
        if path.suffix == ".onnx":
            return _OnnxGraph(path, device=device)
        if path.suffix == ".xml":
            _check_xml(path)
            return _OpenvinoGraph(path, device=device)
        return _TorchGraph(path, device=device)
    except ModuleNotFoundError as error:
        package = _PACKAGES[path.suffix]
        if error.name not in (package, "torchvision"):
            raise
        raise ExportError(
            f"{path}: needs {error.name}, which is not installed (pip install {error.name})"
        ) from error
    except SniperError:
        raise
    except Exception as error:  # engines have exceptions of their own
        raise ExportError(f"{path}: cannot be read ({' '.join(str(error).split())[:500]})") from error


def _read_metadata(text: str | None, *, path: Path) -> ExportedSpec:
    if text is None:
        raise ExportError(f"{path}: was not written by sniper export")
    try:
        version = parse_json(text, dict[str, Any]).get("version")
        if version != VERSION:
            raise ExportError(f"{path}: is of version {version}, expected {VERSION}; export it again")
        return parse_json(text, ExportedSpec)
    except ValueError as error:
        raise ExportError(
            f"{path}: what the search needs beside the graph cannot be read ({error})"
        ) from error


def _num_threads() -> int | None:
    """Return the number of threads that the environment asks for; None leaves it to the engine."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) else None
