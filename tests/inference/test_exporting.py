"""Exported detectors detect what torch does, in every engine, and state what cannot be exported."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from sniper.chips import LevelSpec
from sniper.config.experiment import ExperimentSpec, PredictSpec
from sniper.data.datasets import Category
from sniper.data.spec import DataSpec, ReadSpec
from sniper.errors import ConfigError, ExportError
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.inference.calibration import Calibration
from sniper.inference.detector import Detector
from sniper.inference.exported import ExportedFile, load_exported
from sniper.inference.exporting import (
    ExportedModel,
    ExportOptions,
    check_path,
    export_model,
    share_equal,
    to_onnx,
    write,
)
from sniper.inference.loading import LoadedModel
from sniper.inference.openvino_parts import GraphParts
from tests.models.graphs import DETECTORS, build_random, draw_noise

CATEGORIES = tuple(Category(category_id=number, name=f"class {number}") for number in (7, 9, 30))
LEVELS = (LevelSpec(factor=1.5, below=90), LevelSpec(long_side=128, at_least=60))
CHOSEN = Calibration(
    step=0,
    num_images=1,
    num_compared=1,
    merge="hard",
    soft_nms_sigma=0.55,
    merge_iou=0.6,
    min_score=0.25,
    f1=1.0,
    precision=1.0,
    recall=1.0,
)
OF_ANY_SIDES = [name for name in DETECTORS if name != "rt_detr_v2"]


def load_random(name: str, folder: Path) -> LoadedModel:
    """Return a random detector as if it were loaded from a run."""
    model = build_random(name, folder)
    predict = PredictSpec(levels=LEVELS, precision="fp32", merge="auto", window=256)
    read = ReadSpec(intensity_range=(0.0, 510.0))
    weights = folder / "weights.safetensors"
    weights.write_bytes(b"weights")
    return LoadedModel(
        model=model,
        spec=ExperimentSpec(model=model.spec, predict=predict, data=DataSpec(read=read)),
        categories=CATEGORIES,
        weights=weights,
        calibration=CHOSEN,
    )


def in_torch(loaded: LoadedModel) -> Detector:
    detector = Detector.from_model(
        loaded.model, spec=loaded.spec, categories=loaded.categories, device=torch.device("cpu")
    )
    return detector.calibrated(CHOSEN)


def check_same(found: Detections, expected: Detections) -> None:
    """Check that detections agree to 0.01 px and 0.0001; rounding may decide between a few that overlap."""
    assert len(expected) > 5
    assert abs(len(found) - len(expected)) <= 0.02 * len(expected) + 1
    is_same = (
        (np.abs(expected.boxes[:, None] - found.boxes[None]).max(axis=2) <= 0.01)
        & (np.abs(expected.scores[:, None] - found.scores[None]) <= 1e-4)
        & (expected.labels[:, None] == found.labels[None])
    )
    assert is_same.any(axis=1).mean() >= 0.97


@pytest.fixture(scope="module", autouse=True)
def _without_shape_checks() -> Iterator[None]:
    """Leave out the checks of annotations, which compare shapes that an exporter does not know."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_random("fpn", tmp_path_factory.mktemp("loaded"))


@pytest.fixture(scope="module")
def exported(loaded: LoadedModel) -> ExportedModel:
    return to_onnx(loaded)


@pytest.fixture(scope="module")
def onnx_file(exported: ExportedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    write(path, exported)
    return path


@pytest.fixture(scope="module")
def openvino_file(exported: ExportedModel, onnx_file: Path) -> Path:
    pytest.importorskip("openvino")
    path = onnx_file.with_suffix(".xml")
    write(path, exported)
    return path


def test_onnx_runtime_detects_what_torch_does_in_large_and_small_images(
    loaded: LoadedModel, onnx_file: Path
) -> None:
    detector = Detector.load(onnx_file)
    for seed, sides in enumerate((Sides(500, 310), Sides(90, 120), Sides(700, 64))):
        image = draw_noise(sides, seed=seed)
        check_same(detector.predict(image), in_torch(loaded).predict(image))


def test_openvino_detects_what_torch_does_however_often_a_shape_comes(
    loaded: LoadedModel, openvino_file: Path
) -> None:
    detector = load_exported(openvino_file, predict={"precision": "fp32"})
    image = draw_noise(Sides(500, 310), seed=0)
    expected = in_torch(loaded).predict(image)
    for _ in range(6):  # of 4 windows of one shape each, then compiled for it
        check_same(detector.predict(image), expected)


def check_parts(path: Path) -> None:
    """Check that two parts of a graph, both in float32, detect what the whole does, for any sides and fixed ones."""
    import openvino

    core, options = openvino.Core(), {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = core.read_model(path)
    parts = GraphParts.of(model)
    assert parts is not None
    types = {node.get_type_name() for node in parts.dense.get_ops()}
    assert "Convolution" in types
    assert not types & {"NonMaxSuppression", "TopK", "ROIAlign"}
    whole = core.compile_model(model, "CPU", options)
    shape = (1, 3, 192, 256)
    image = draw_noise(Sides(256, 192), seed=3).transpose(2, 0, 1)[None]
    inputs = {"image": np.ascontiguousarray(image), "sides": np.array([250, 180])}
    expected = whole(inputs)
    assert len(expected["scores"]) > 5
    for each in (parts, parts.reshaped({"image": shape})):
        found = each.compile(core, "CPU", options)(inputs)
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_the_parts_of_an_openvino_graph_detect_what_the_whole_does(openvino_file: Path) -> None:
    check_parts(openvino_file)


def test_openvino_keeps_boxes_in_float32_where_it_computes_in_another_precision(
    openvino_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only compiled here: detecting in bfloat16 uses AMX, whose registers the signal stack of pytest is too small for.

    `test_an_exported_detector_needs_no_torch` detects in this precision in a process of its own.
    """
    import openvino

    hints: list[str | None] = []
    compile_model = openvino.Core.compile_model

    def spy(self: openvino.Core, model: openvino.Model, device: str, options: dict[str, object]) -> object:
        has_boxes = any(node.get_type_name() == "ROIAlign" for node in model.get_ops())
        hints.append(f"{'boxes' if has_boxes else 'dense'} {options.get('INFERENCE_PRECISION_HINT')}")
        return compile_model(self, model, device, options)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    for precision, expected in (
        ("fp32", ["boxes f32"]),
        ("bf16", ["dense bf16", "boxes f32"]),
        ("auto", ["dense None", "boxes f32"]),
    ):
        hints.clear()
        load_exported(openvino_file, predict={"precision": precision})
        assert hints == expected


def test_the_file_has_all_that_a_search_needs(exported: ExportedModel, onnx_file: Path) -> None:
    opened = ExportedFile.open(onnx_file)
    assert opened.spec == exported.spec
    detector = opened.detector()
    assert detector.categories == CATEGORIES
    assert detector.min_score == 0.25
    assert detector.spec == PredictSpec(levels=LEVELS, merge="hard", merge_iou=0.6, window=256)
    assert detector.data.read == ReadSpec(intensity_range=(0.0, 510.0))
    deep = draw_noise(Sides(100, 100), seed=0).astype(np.uint16) * 2
    assert detector.predict(deep).class_names == ("class 7", "class 9", "class 30")


def test_fields_of_predict_are_set_when_a_file_is_loaded(onnx_file: Path) -> None:
    detector = load_exported(onnx_file, predict={"max_detections": 3})
    assert len(detector.predict(draw_noise(Sides(300, 200), seed=0))) == 3
    with pytest.raises(ConfigError, match=r"predict.precision.*not in bf16"):
        load_exported(onnx_file, predict={"precision": "bf16"})


def test_weights_in_half_precision_take_half_the_file(
    exported: ExportedModel, onnx_file: Path, openvino_file: Path, tmp_path: Path
) -> None:
    image = draw_noise(Sides(300, 200), seed=0)
    for whole in (onnx_file, openvino_file):
        path = tmp_path / whole.name
        write(path, exported, half=True)
        weights = whole.with_suffix(".bin" if whole.suffix == ".xml" else whole.suffix)
        assert (tmp_path / weights.name).stat().st_size < 0.75 * weights.stat().st_size
        options = {"precision": "fp32"} if whole.suffix == ".xml" else {}
        expected = load_exported(whole, predict=options).predict(image)
        assert share_equal(expected, load_exported(path, predict=options).predict(image)) > 0.5


def test_an_exported_detector_needs_no_torch(onnx_file: Path, openvino_file: Path) -> None:
    program = f"""
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None  # importing them fails
import numpy as np
import sniper.runtime
for path in {[str(onnx_file), str(openvino_file)]}:
    detections = sniper.runtime.load(path).predict(np.full((200, 300, 3), 90, dtype=np.uint8))
    assert detections.class_names == ("class 7", "class 9", "class 30")
import sniper.cli, sniper.reports.pictures, sniper.inference.results, sniper.evaluation.coco
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_ANY_SIDES)
def test_every_detector_is_exported(name: str, tmp_path: Path) -> None:
    loaded = load_random(name, tmp_path)
    write(tmp_path / "model.onnx", to_onnx(loaded))
    detector = load_exported(tmp_path / "model.onnx")
    for seed, sides in enumerate((Sides(300, 210), Sides(120, 90))):
        image = draw_noise(sides, seed=seed)
        check_same(detector.predict(image), in_torch(loaded).predict(image))


@pytest.mark.slow
def test_a_detector_that_is_not_exported_for_any_sides_says_so_and_is_for_fixed_ones(tmp_path: Path) -> None:
    loaded = load_random("rt_detr_v2", tmp_path)
    with pytest.raises(ExportError, match="fixed sides"):
        to_onnx(loaded)
    write(tmp_path / "model.onnx", to_onnx(loaded, options=ExportOptions(sides=Sides(256, 256))))
    image = draw_noise(Sides(170, 170), seed=0)  # 255 px at scale 1.5, padded to the same in torch
    fine = replace(loaded.spec, predict=replace(loaded.spec.predict, levels=(LevelSpec(factor=1.5),)))
    expected = in_torch(replace(loaded, spec=fine)).predict(image)
    detector = load_exported(tmp_path / "model.onnx", predict={"levels": [{"factor": 1.5}]})
    check_same(detector.predict(image), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["concat", "fcos", "retinanet"])
def test_graphs_of_other_detectors_have_two_parts(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    export_model(load_random(name, tmp_path), tmp_path / "model.xml")
    check_parts(tmp_path / "model.xml")


@pytest.mark.slow
def test_deformable_convolutions_are_refused_for_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(ExportError, match=r"OpenVINO cannot run this detector \(.*DeformConv"):
        export_model(load_random("deformable", tmp_path), tmp_path / "model.xml")
    assert not (tmp_path / "model.xml").exists()


@pytest.mark.slow
def test_windows_of_fixed_sides_cover_a_large_image(tmp_path: Path) -> None:
    loaded = load_random("concat", tmp_path)
    export_model(loaded, tmp_path / "model.onnx", options=ExportOptions(sides=Sides(256, 192)))
    detector = load_exported(tmp_path / "model.onnx")
    assert detector.window_sides == Sides(256, 192)
    detections = detector.predict(draw_noise(Sides(500, 400), seed=0))
    assert detections.boxes[:, 2].max() > 450
    assert detections.boxes[:, 3].max() > 350


@pytest.mark.slow
def test_torch_export_writes_one_file(loaded: LoadedModel, tmp_path: Path) -> None:
    export_model(loaded, tmp_path / "model.pt2")
    image = draw_noise(Sides(300, 200), seed=0)
    check_same(Detector.load(tmp_path / "model.pt2").predict(image), in_torch(loaded).predict(image))


def test_sides_that_the_detector_cannot_have_are_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="multiples of 64 pixels"):
        export_model(loaded, tmp_path / "model.onnx", options=ExportOptions(sides=Sides(512, 500)))


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"model.onnx: cannot be read"):
        Detector.load(path)
    with pytest.raises(ExportError, match=r"model.bin: expected a file that ends with .onnx, .xml, .pt2"):
        load_exported(tmp_path / "model.bin")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript", "openvino"])
def test_a_package_that_is_not_installed_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ExportError, match=rf"needs {package}, .*\(pip install 'sniper-det\[onnx,openvino\]'\)"
    ):
        check_path(tmp_path / "model.xml", ExportOptions())


def test_only_exported_files_are_replaced(
    exported: ExportedModel, onnx_file: Path, openvino_file: Path, tmp_path: Path
) -> None:
    import onnx

    for path in (onnx_file, openvino_file, tmp_path / "new.onnx", tmp_path / "new.xml"):
        check_path(path, ExportOptions())
    model = onnx.load_from_string(exported.onnx)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    (tmp_path / "annotations.xml").write_text("<annotations><version>1.1</version></annotations>")
    (tmp_path / "weights.bin").write_bytes(b"weights of another model")
    for name, refused in (
        ("other.onnx", "other.onnx"),
        ("annotations.xml", "annotations.xml"),
        ("weights.xml", "weights.bin"),
    ):
        with pytest.raises(ExportError, match=rf"{refused}: was not written by sniper export"):
            check_path(tmp_path / name, ExportOptions())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: None, "was not written by sniper export"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "of version 2, expected 1"),
        (
            lambda text: text.replace('"multiple": 64', '"multiple": 0'),
            "multiple: Input should be greater than 0",
        ),
        (lambda text: "{", "cannot be read"),
    ],
)
def test_a_model_of_other_origin_is_refused(
    exported: ExportedModel, tmp_path: Path, change: "object", message: str
) -> None:
    import onnx

    assert callable(change)
    model = onnx.load_from_string(exported.onnx)
    text = change(model.metadata_props[0].value)
    del model.metadata_props[:]
    if text is not None:
        onnx.helper.set_model_props(model, {"sniper": text})
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=message):
        load_exported(tmp_path / "model.onnx")


def test_a_device_that_the_engine_lacks_is_refused(onnx_file: Path, openvino_file: Path) -> None:
    with pytest.raises(ExportError, match="device nsp: this ONNX Runtime has"):
        Detector.load(onnx_file, "nsp")
    with pytest.raises(ExportError, match="device nsp: this OpenVINO has CPU"):
        load_exported(openvino_file, device="nsp")


def test_detections_are_compared_by_box_score_and_label() -> None:
    boxes = np.array([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]])
    one = Detections(boxes=boxes, scores=np.array([0.9, 0.5]), labels=np.array([0, 1]))
    assert share_equal(one, one) == 1.0
    assert share_equal(one, replace(one, boxes=boxes + np.array([[0, 0, 0, 0], [1, 0, 0, 0]]))) == 0.5
    assert share_equal(one, replace(one, scores=one.scores + 0.1)) == 0.0
    assert share_equal(one, replace(one, labels=one.labels[::-1])) == 0.0
    assert share_equal(one, Detections.empty()) == 0.0
    assert share_equal(Detections.empty(), one) == 1.0


def test_the_text_in_a_file_is_json_that_python_reads(exported: ExportedModel) -> None:
    assert json.loads(exported.spec.to_json())["classes"][2] == {"category_id": 30, "name": "class 30"}
