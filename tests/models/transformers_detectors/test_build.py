"""Detectors of transformers are built from their specs alone, and their weights loaded with classes by name."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import dump_experiment, parse_experiment
from sniper.data.datasets import Category
from sniper.errors import ConfigError, WeightsError
from sniper.models.build import build_detector, check_available, find_download, load_library_weights, resolve
from sniper.models.spec import BackboneSpec, DetectorSpec, TransformersSpec
from sniper.models.weights import fill_module, load_tensors, save_tensors
from sniper.runs.initial import InitialWeights
from tests.models.transformers_detectors.specs import ALL, SOME, build, save, spec_of, transformers

CLASSES = {
    "rt_detr_v2": ("net.model.enc_score_head.weight", False),
    "deformable_detr": ("net.class_embed.0.weight", False),
    "yolos": ("net.class_labels_classifier.layers.2.weight", True),
}
"""A tensor with rows for classes, and whether the last is that of no object."""


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that does not answer, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ALL)
def test_a_resolved_spec_builds_the_same_detector_without_its_folder(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / name)
    spec = resolve(spec_of(folder))
    expected = build_detector(spec, num_classes=5, seed=3)
    folder.rename(tmp_path / "gone")
    text = dump_experiment(ExperimentSpec(model=spec))
    read = parse_experiment(text, source=tmp_path / "config.yaml").model
    model = build_detector(read, num_classes=5, seed=3)
    state, other = expected.state_dict(), model.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(tensor, other[key]) for key, tensor in state.items())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "gone", num_labels=5)
    original = transformers.AutoModelForObjectDetection.from_config(config)
    shapes = {f"net.{key}": tensor.shape for key, tensor in original.state_dict().items()}
    assert {key: tensor.shape for key, tensor in state.items()}.items() <= shapes.items()


@pytest.mark.parametrize("name", SOME)
def test_each_tensor_is_saved_once_and_loaded_everywhere(name: str, tmp_path: Path) -> None:
    model, other = build(name, tmp_path / "a"), build(name, tmp_path / "b", seed=1)
    save_tensors(tmp_path / "weights.safetensors", model.state_dict(), head={})
    tensors, _ = load_tensors(tmp_path / "weights.safetensors", dict)
    fill_module(other, tensors, source=tmp_path)
    for (key, parameter), (_, expected) in zip(
        other.net.named_parameters(remove_duplicate=False),
        model.net.named_parameters(remove_duplicate=False),
        strict=True,
    ):
        assert torch.equal(parameter, expected), key


@pytest.mark.parametrize("name", SOME)
def test_weights_are_loaded_with_classes_matched_by_name(name: str, tmp_path: Path) -> None:
    spec = spec_of(save(name, tmp_path / name, names=("cat", "N/A", "dog", "cow")))
    initial = InitialWeights.of_library(spec)
    assert [(each.name, each.category_id) for each in initial.categories] == [
        ("cat", 0),
        ("dog", 2),
        ("cow", 3),
    ]
    categories = tuple(Category(category_id=index, name=each) for index, each in enumerate(("new", "dog")))
    model = build_detector(resolve(spec), num_classes=2, seed=7)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = str(initial.load_into(model, categories))
    assert "with the scores of 1 class (dog) matched by name" in report
    assert "made anew: the scores of 1 class (new); not used: the scores of 2 classes (cat, cow)" in report
    library = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / name).state_dict()
    tensor, has_no_object = CLASSES[name]
    rows, old = model.state_dict()[tensor], library[tensor.removeprefix("net.")]
    assert torch.equal(rows[0], before[tensor][0])
    assert torch.equal(rows[1], old[2])
    assert torch.equal(rows[-1], old[-1 if has_no_object else 2])
    layouts = model.class_layouts
    assert tensor in layouts
    for key, value in model.state_dict().items():
        if key not in layouts:
            assert torch.equal(value, library[key.removeprefix("net.")]), key


def test_weights_that_a_folder_lacks_are_made_anew(tmp_path: Path) -> None:
    folder = save("yolos", tmp_path / "yolos")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    bias = tensors.pop("bbox_predictor.layers.0.bias")
    save_file(tensors | {"extra.weight": bias}, folder / "model.safetensors", metadata={"format": "pt"})
    initial = InitialWeights.of_library(spec_of(folder))
    model = build_detector(resolve(spec_of(folder)), num_classes=3)
    report = str(initial.load_into(model, initial.categories))
    assert "made anew: 1 tensor (net.bbox_predictor.layers.0.bias)" in report
    assert "not used: 1 tensor (net.extra.weight)" in report
    save_file({"extra.weight": bias}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"model\.safetensors: has other tensors than yolos: "):
        load_library_weights(spec_of(folder))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folder = save("yolos", tmp_path / "yolos")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"yolos: its weights cannot be loaded \("):
        load_library_weights(spec_of(folder))
    (folder / "model.safetensors").write_bytes(b"none")
    with pytest.raises(WeightsError, match=r"yolos: its weights cannot be loaded \("):
        load_library_weights(spec_of(folder))


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        ({"do_normalize": False}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        (
            {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]},
            (0.5, 0.4, 0.3),
            (0.2, 0.2, 0.1),
        ),
        (
            {
                "do_normalize": True,
                "image_mean": [1, 1, 1],
                "image_std": [2, 2, 2],
                "rescale_factor": 1 / 127.5,
            },
            (0.5, 0.5, 0.5),
            (1.0, 1.0, 1.0),
        ),
        (None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
    ids=["none", "mean", "rescaled", "no file"],
)
def test_images_are_normalised_as_the_image_processor_does(
    values: dict[str, object] | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tmp_path: Path,
) -> None:
    folder = save("rt_detr_v2", tmp_path / "detector")
    processor = None
    if values is not None:
        processor = transformers.RTDetrImageProcessor(**values, do_resize=False)
        processor.save_pretrained(folder)
    options = resolve(spec_of(folder)).transformers
    assert options.image_mean == pytest.approx(mean)
    assert options.image_std == pytest.approx(std)
    if processor is not None:
        model = build_detector(spec_of(folder), num_classes=2)
        pixels = torch.arange(3 * 64 * 64).reshape(3, 64, 64).remainder(256).to(torch.uint8)
        expected = processor(images=[pixels], return_tensors="pt")["pixel_values"]
        from sniper.models.protocol import pad_images

        inputs = model._inputs(*pad_images([pixels]))  # type: ignore[operator]
        torch.testing.assert_close(inputs["pixel_values"], expected)


def test_detr_without_an_image_processor_has_the_mean_of_imagenet(tmp_path: Path) -> None:
    options = resolve(spec_of(save("detr", tmp_path / "detr"))).transformers
    assert options.image_mean == (0.485, 0.456, 0.406)


def test_a_size_of_images_in_the_configuration_is_not_used(tmp_path: Path) -> None:
    folder = save("rt_detr_v2", tmp_path / "detector", anchor_image_size=[64, 64])
    model = build_detector(spec_of(folder, pretrained=False), num_classes=2).eval()
    model.detect([torch.zeros((3, 128, 192), dtype=torch.uint8)])


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("yolos", tmp_path / "yolos")
    for package in ("scipy", "transformers"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(
                ConfigError, match=rf"needs the package {package}: pip install 'sniper-det\[transformers\]'$"
            ):
                check_available(spec_of(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"no: has no config\.json; expected a folder that save_pretrained has written$"),
        ("{", r"no: has no configuration that transformers can read \("),
        ('{"model_type": "vit"}', r"no is of type 'vit' of transformers; supported are "),
        (
            '{"model_type": "yolos"}',
            r"no: has no weights \(model\.safetensors\); start from random ones \(--model\.transformers\.pretrained fa",
        ),
    ],
    ids=["empty", "broken", "other", "no weights"],
)
def test_a_folder_that_has_no_detector_is_refused(config: str | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "no"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises((ConfigError, WeightsError), match=message):
        resolve(spec_of(folder, pretrained="no weights" in message))


def test_code_of_a_folder_is_not_executed(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    values = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ConfigError, match=r"has no configuration that transformers can read \("):
        resolve(spec_of(folder, pretrained=False))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "yolos", "num_attention_heads": "many"}', r"transformers [\d.]+ cannot use it \("),
        ('{"model_type": "yolos", "auxiliary_loss": true}', r"auxiliary_loss must be false for yolos$"),
        ("[1]", r"expected a JSON object \(Input should be an object\)$"),
    ],
)
def test_a_configuration_that_transformers_cannot_use_is_refused(config: str, message: str) -> None:
    options = TransformersSpec(config=config, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    spec = DetectorSpec(kind="transformers", name="mine", transformers=options)
    with pytest.raises(ConfigError, match=rf"model\.transformers\.config: {message}"):
        build_detector(spec, num_classes=2)


@pytest.mark.usefixtures("unreachable")
def test_a_download_that_is_not_possible_is_one_sentence() -> None:
    spec = DetectorSpec(kind="transformers", name="someone/detector")
    assert find_download(spec) == "weights of someone/detector"
    message = (
        r"^weights of someone/detector: must be downloaded, and http://127\.0\.0\.1:9 cannot be reached \(.*\); name a "
        r"folder that has it \(--model\.name FOLDER\)$"
    )
    with pytest.raises(WeightsError, match=message):
        resolve(spec)
    with pytest.raises(WeightsError, match=r"^configuration of someone/detector: must be downloaded"):
        resolve(
            DetectorSpec(kind="transformers", name=spec.name, transformers=TransformersSpec(pretrained=False))
        )
    with pytest.raises(
        ConfigError, match=r"model\.name: some/missing/folder: no such folder; expected a folder"
    ):
        resolve(DetectorSpec(kind="transformers", name="some/missing/folder"))


def test_a_folder_is_downloaded_from_nowhere(tmp_path: Path) -> None:
    assert find_download(spec_of(save("yolos", tmp_path / "yolos"))) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "name: is missing; kind transformers needs the name of a detector on the Hugging Face hub"),
        (
            {"name": "a/b", "weights": "DEFAULT"},
            "weights: is of kind torchvision; a detector of transformers has",
        ),
        (
            {"name": "a/b", "backbone": BackboneSpec(frozen_stages=0)},
            "backbone: a detector of transformers does not",
        ),
        (
            {
                "kind": "torchvision",
                "name": "fcos_resnet50_fpn",
                "transformers": TransformersSpec(pretrained=False),
            },
            "transformers: is a section of kind transformers, not of torchvision",
        ),
    ],
)
def test_fields_of_other_kinds_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectorSpec(**{"kind": "transformers", **fields})  # type: ignore[arg-type]


def test_a_relative_folder_is_found_beside_the_experiment(tmp_path: Path) -> None:
    save("yolos", tmp_path / "mine" / "yolos")
    text = "model: {kind: transformers, name: mine/yolos}"
    spec = parse_experiment(text, source=tmp_path / "experiment.yaml")
    assert spec.model.name == str(tmp_path / "mine" / "yolos")
    text = "model: {kind: transformers, name: someone/yolos}"
    assert parse_experiment(text, source=tmp_path / "experiment.yaml").model.name == "someone/yolos"
