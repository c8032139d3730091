"""Weights of torchvision's detectors: by name and from files, with classes matched by name."""

import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights, ssdlite320_mobilenet_v3_large

import sniper
from sniper.errors import ConfigError, WeightsError
from sniper.models.build import build_detector, check_available, find_download
from sniper.models.spec import BackboneSpec, DetectorSpec
from sniper.models.torchvision_detectors.one_stage import OneStageModel
from sniper.models.torchvision_detectors.weights import load_library_weights
from sniper.runs.initial import InitialWeights
from tests.models.torchvision_detectors.specs import SPECS, SSD, build
from tests.runs.test_initial import named

OWN = BackboneSpec(pretrained=False)
NAMES = SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"]


@pytest.fixture(scope="module")
def trained() -> Any:
    """A detector of torchvision with random weights and COCO's classes."""
    torch.manual_seed(0)
    net = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    for module in net.head.classification_head.module_list:
        torch.nn.init.normal_(module[-1].bias, std=2.0)
        no_class = [index for index, name in enumerate(NAMES) if name == "N/A"]
        module[-1].bias.data.reshape(-1, len(NAMES))[:, no_class] = -30.0  # as in trained weights
    return net


@pytest.fixture(scope="module")
def file(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "ssd.pth"
    torch.save(trained.state_dict(), path)
    return path


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (320, 320, 3), dtype=np.uint8)


def test_a_detector_of_torchvision_is_searched_without_training(trained: Any, file: Path) -> None:
    whole = {
        "levels": [{"factor": 1.0}],
        "merge": "hard",
        "merge_iou": 0.99,
        "max_detections": 1000,
        "precision": "fp32",
    }
    detector = sniper.Detector.load(f"torchvision:{SSD}@{file}", "cpu", predict=whole)
    assert len(detector.categories) == 80
    assert (detector.categories[0].name, detector.categories[0].category_id) == ("person", 1)
    assert detector.categories[-1].category_id == 90
    detections = detector.predict(noise())
    with torch.inference_mode():
        (expected,) = trained([torch.from_numpy(noise()).permute(2, 0, 1).float() / 255])
    names = [NAMES[label] for label in expected["labels"].tolist()]
    is_class = np.array([name != "N/A" for name in names])
    assert is_class.sum() > 10
    best = np.flatnonzero(is_class)[:10]
    np.testing.assert_allclose(detections.scores[0], expected["scores"][best[0]], atol=1e-4)
    found = {(name, round(score, 3)) for name, score in zip(detections.names, detections.scores, strict=True)}
    assert {(names[i], round(float(expected["scores"][i]), 3)) for i in best} <= found


def test_classes_are_loaded_by_name_and_others_made_anew(trained: Any, file: Path) -> None:
    initial = InitialWeights.of_library(DetectorSpec(kind="torchvision", name=SSD, weights=str(file)))
    categories = named("kiosk", "dog", "Person")
    model = build_detector(
        DetectorSpec(kind="torchvision", name=SSD, weights=str(file), backbone=OWN), num_classes=3
    )
    report = initial.load_into(model, categories)
    assert report.kept == ("dog", "Person")
    assert report.added == ("kiosk",)
    name = "head.classification_head.module_list.0.1.bias"
    rows = model.state_dict()[f"net.{name}"].reshape(6, 4)
    expected = trained.state_dict()[name].reshape(6, 91)
    assert torch.equal(rows[:, [0, 2, 3]], expected[:, [0, NAMES.index("dog"), 1]])
    assert not torch.equal(rows[:, 1], expected[:, 1])
    assert "with the scores of 2 classes (dog, Person) matched by name" in str(report)
    assert "made anew: the scores of 1 class (kiosk)" in str(report)


def test_a_file_with_other_classes_is_trained_from_but_not_searched_with(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    net = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    save_file(net.state_dict(), path)
    spec = DetectorSpec(kind="torchvision", name=SSD, weights=str(path), backbone=OWN)
    model = build_detector(spec, num_classes=2)
    report = InitialWeights.of_library(spec).load_into(model, named("a", "b"))
    assert {name.rpartition(".")[0] for name in report.transfer.renewed} == {
        f"net.head.classification_head.module_list.{index}.1" for index in range(6)
    }
    assert torch.equal(
        model.state_dict()["net.backbone.features.0.0.0.weight"],
        net.state_dict()["backbone.features.0.0.0.weight"],
    )
    with pytest.raises(WeightsError, match=r"other\.safetensors: has other classes than torchvision"):
        sniper.Detector.load(f"torchvision:{SSD}@{path}")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"weight": torch.zeros(3)},
            r"w\.pth: is not of ssdlite320\S+: head\.classification_head\S+ is missing; weights of a backbone belong",
        ),
        ({"epoch": 3}, r"w\.pth: cannot be loaded into ssdlite320\S+ \(it has no tensors by name\)"),
    ],
)
def test_files_of_other_models_are_refused(tensors: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        load_library_weights(DetectorSpec(kind="torchvision", name=SSD, weights=str(tmp_path / "w.pth")))


def test_weights_that_lack_layers_are_refused(trained: Any, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in trained.state_dict().items() if "extra.0" not in name}
    torch.save(tensors | {"other": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"does not fit ssdlite320\S+: backbone\.extra\.0\S+ is missing"):
        load_library_weights(DetectorSpec(kind="torchvision", name=SSD, weights=str(tmp_path / "w.pth")))


@pytest.mark.parametrize("name", ["torchvision:", "torchvision:fcos", "torchvision:fcos@w.pth"])
def test_names_that_have_no_weights_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected torchvision:NAME or torchvision:NAME@FILE"):
        sniper.Detector.load(name)


def test_unknown_weights_are_refused_with_the_known_names() -> None:
    spec = DetectorSpec(kind="torchvision", name=SSD, weights="COCO_V9", backbone=OWN)
    with pytest.raises(
        ConfigError, match=r"COCO_V9: no such file, .* expected COCO_V1 or DEFAULT, or a file"
    ):
        check_available(spec)


@pytest.mark.parametrize(("weights", "backbone"), [("COCO_V1", OWN), (None, BackboneSpec())])
def test_weights_that_cannot_be_downloaded_are_reported_with_the_ways_out(
    weights: str | None, backbone: BackboneSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    spec = DetectorSpec(kind="torchvision", name="fcos_resnet50_fpn", weights=weights, backbone=backbone)
    with pytest.raises(
        WeightsError, match=r"no connection\); put the file into .*--model\.weights FILE"
    ) as caught:
        check_available(spec)
    assert "--model.backbone.pretrained false" in str(caught.value)
    assert str(find_download(spec)).endswith(" MB")
    assert find_download(DetectorSpec(kind="torchvision", name="fcos_resnet50_fpn", backbone=OWN)) is None


def test_the_weights_of_the_backbone_alone_do_not_fit_ssdlite() -> None:
    spec = DetectorSpec(kind="torchvision", name=SSD)
    with pytest.raises(ConfigError, match=r"pretrained: ssdlite320\S+ has fewer channels"):
        build_detector(spec, num_classes=2)


@pytest.mark.parametrize("name", SPECS)
def test_every_row_of_a_class_is_loaded_from_its_own(name: str) -> None:
    model, other = build(name, num_classes=3).eval(), build(name, num_classes=3, seed=1).eval()
    labels = [2, 0, 1]
    tensors = model.state_dict()
    for key, layout in model.class_layouts.items():
        tensors[key] = tensors[key][layout.rows(labels, num_classes=3)]
    other.load_state_dict(tensors)
    image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    slots = [model.first_label + label for label in labels]
    if model.first_label:
        slots.insert(0, 0)
    if isinstance(model, OneStageModel) and isinstance(other, OneStageModel):
        before, after = (each._predict(each.pad(list(image))[0])[0]["cls_logits"] for each in (model, other))
        torch.testing.assert_close(after, before[..., slots])
        return
    hidden = torch.rand(5, 1024)
    logits, deltas = model.net.roi_heads.box_predictor(hidden)
    other_logits, other_deltas = other.net.roi_heads.box_predictor(hidden)
    torch.testing.assert_close(other_logits, logits[:, slots])
    torch.testing.assert_close(other_deltas.reshape(5, 4, 4), deltas.reshape(5, 4, 4)[:, slots])
