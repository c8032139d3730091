"""`sniper predict`: which images it searches, what it writes, and what it refuses."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyogrio
import pytest
import torch
import yaml
from PIL import Image
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights, ssdlite320_mobilenet_v3_large

from sniper.cli import run as run_command
from sniper.errors import printable
from sniper.inference.calibration import Calibration, save_calibration
from sniper.runs.run import Run
from tests.cli.commands import CommandLine
from tests.data.geotiffs import write_geotiff
from tests.data.tiny import write_image

COCO_NAMES = SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta["categories"]


def test_the_test_images_of_the_experiment_are_searched_and_drawn(
    trained_folder: Path, sniper: CommandLine
) -> None:
    result = sniper.json("predict", trained_folder / "run", "--draw", trained_folder / "drawn")
    assert result["num_images"] == 4
    assert result["num_detections"] > 0
    assert len(list((trained_folder / "drawn").glob("*.jpg"))) == 4


def test_the_first_images_of_annotations_are_searched(trained_folder: Path, sniper: CommandLine) -> None:
    annotations = ("--annotations", trained_folder / "train.json", "--images", trained_folder / "images")
    sniper.json(
        "predict", trained_folder / "run", *annotations, "--limit", "2", "-o", trained_folder / "two.json"
    )
    scores = sniper.json("evaluate", trained_folder / "two.json", trained_folder / "train.json", "--limit", 2)
    assert scores["num_images"] == 2


def test_image_files_are_searched_without_annotations(trained_folder: Path, sniper: CommandLine) -> None:
    images = [trained_folder / "other.png", trained_folder / "images" / "train_0.png"]
    write_image(images[0], width=320, height=16)
    output = trained_folder / "found" / "here.json"
    assert sniper.json("predict", trained_folder / "run", *images, "-o", output)["num_images"] == 2
    entries = {(entry["image_id"], entry["file_name"]) for entry in json.loads(output.read_text())}
    assert entries == {(1, str(images[0])), (2, str(images[1]))}


def test_a_search_stopped_by_a_bad_image_is_continued(trained_folder: Path, sniper: CommandLine) -> None:
    search = ("predict", trained_folder / "run", trained_folder / "images")
    whole = sniper.json(*search)
    expected = (trained_folder / "run" / "detections.json").read_bytes()
    bad = trained_folder / "images" / "train_2.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:300])
    assert "train_2.png: cannot be read" in sniper.error(*search)
    bad.write_bytes(content)
    assert sniper.json(*search, "--resume")["num_detections"] == whole["num_detections"]
    assert (trained_folder / "run" / "detections.json").read_bytes() == expected


def write_with_categories(folder: Path, name: str, ids: dict[str, tuple[int, str]]) -> Path:
    """Write `train.json` again, with other ids and names of its categories, by their names."""
    content = json.loads((folder / "train.json").read_text())
    old = {category["id"]: category["name"] for category in content["categories"]}
    used = {old[entry["category_id"]] for entry in content["annotations"]}
    assert used == {"dark", "bright"}
    for entry in content["annotations"]:
        entry["category_id"] = ids[old[entry["category_id"]]][0]
    content["categories"] = [{"id": number, "name": text} for number, text in ids.values()]
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def without_category(path: Path) -> list[dict[str, Any]]:
    entries = json.loads(path.read_text())
    return [{key: entry[key] for key in ("image_id", "bbox", "score", "category_name")} for entry in entries]


def without_classes(scores: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of all classes together; those of each are in the order of their ids."""
    return {name: value for name, value in scores.items() if not isinstance(value, list)}


def test_results_have_the_ids_of_the_file_that_is_searched(trained_folder: Path, sniper: CommandLine) -> None:
    """Two files whose categories have exchanged ids give equal scores."""
    other = write_with_categories(
        trained_folder, "other.json", {"dark": (11, "dark"), "bright": (10, "bright")}
    )
    scores = []
    for name, truth in (("a.json", trained_folder / "train.json"), ("b.json", other)):
        search = ("predict", trained_folder / "run", "--annotations", truth, "-o", trained_folder / name)
        err = sniper.text(*search, "--draw", trained_folder / "drawn").err
        assert ("'dark' is 11, not 10; 'bright' is 10, not 11" in " ".join(err.split())) is (truth == other)
        scores.append(without_classes(sniper.json("evaluate", trained_folder / name, truth)))
    first, second = (json.loads((trained_folder / name).read_text()) for name in ("a.json", "b.json"))
    assert without_category(trained_folder / "a.json") == without_category(trained_folder / "b.json")
    assert [21 - entry["category_id"] for entry in first] == [entry["category_id"] for entry in second]
    assert scores[0] == scores[1]
    crossed = sniper.text("evaluate", trained_folder / "a.json", other, "--json")
    assert without_classes(json.loads(crossed.out)) == scores[0]
    assert "matched by name" in crossed.err


def test_categories_on_one_side_are_reported_and_their_detections_kept(
    trained_folder: Path, sniper: CommandLine
) -> None:
    other = write_with_categories(trained_folder, "other.json", {"dark": (3, "Dark"), "bright": (5, "lamp")})
    search = ("predict", trained_folder / "run", "--annotations", other, "-o", trained_folder / "found.json")
    err = " ".join(sniper.text(*search, "--draw", trained_folder / "drawn").err.split())
    assert "spells category names otherwise" in err
    assert "'dark' is 'Dark'" in err
    assert "whose objects cannot be detected: 'lamp'" in err
    assert "lacks 1 category of" in err
    assert "written with ids that it does not use: 'bright' 12" in err
    entries = json.loads((trained_folder / "found.json").read_text())
    names = {(entry["category_id"], entry["category_name"]) for entry in entries}
    assert names == {(3, "Dark"), (12, "bright")}
    printed = sniper.text("evaluate", trained_folder / "found.json", other, "--json")
    num_dark = sum(entry["category_id"] == 3 for entry in entries)
    assert json.loads(printed.out)["num_detections"] == num_dark
    assert f"{len(entries) - num_dark} detection" in printed.err


def test_deep_images_are_read_in_the_range_that_is_given(trained_folder: Path, sniper: CommandLine) -> None:
    run, images = trained_folder / "run", trained_folder / "images"
    whole = sniper.json("predict", run, images)["num_detections"]
    for path in images.iterdir():
        with Image.open(path) as image:
            pixels = np.asarray(image)
        deep = pixels.astype(np.uint16) * 100
        cv2.imwrite(str(path), deep[..., ::-1])
    for command in (("predict", run, images), ("evaluate", run)):
        message = sniper.error(*command)
        assert "data.read.intensity_range: [0, 65535]" in message
        assert message.endswith("a field of data.read is set by --data.read.FIELD VALUE")
        assert "flip" in sniper.error(*command, "--data.flip", "0.5")
    option = ("--data.read.intensity_range", "[0, 25500]")
    assert sniper.json("predict", run, images, *option)["num_detections"] == whole
    assert sniper.json("evaluate", run, *option)["num_images"] == 4


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ("images --draw images", "images"),
        ("images --draw images/drawn", "images"),
        ("images --draw .", "images"),
        ("'images/**/*.png' --draw images/drawn", "images"),
        ("images/train_0.png --draw images", "images"),
        ("--draw images", "images"),
        ("--annotations train.json --draw images/drawn", "images"),
    ],
)
def test_pictures_do_not_get_among_the_images(
    trained_folder: Path,
    sniper: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    folder: str,
) -> None:
    monkeypatch.chdir(trained_folder)
    message = sniper.error("predict", "run", *shlex.split(arguments))
    assert f"pictures would be among the images in {trained_folder / folder}; choose another" in message
    assert len(list((trained_folder / "images").iterdir())) == 4


def test_pictures_may_be_in_a_folder_beside_an_image(
    trained_folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained_folder)
    write_image(Path("photo.png"), width=64, height=48)
    sniper.json("predict", "run", "photo.png", "--draw", "found")
    assert [path.name for path in Path("found").iterdir()] == ["000001_photo.jpg"]


@pytest.mark.parametrize("keeps_categories", [True, False])
def test_images_without_annotations_are_searched(
    trained_folder: Path, sniper: CommandLine, keeps_categories: bool
) -> None:
    content = json.loads((trained_folder / "train.json").read_text())
    del content["annotations"]
    if not keeps_categories:
        del content["categories"]
    (trained_folder / "info.json").write_text(json.dumps(content))
    output, drawn = trained_folder / "found.json", trained_folder / "drawn"
    search = ("predict", trained_folder / "run", "--annotations", trained_folder / "info.json", "-o", output)
    assert sniper.json(*search, "--limit", 2, "--draw", drawn)["num_images"] == 2
    names = {entry["category_id"]: entry["category_name"] for entry in json.loads(output.read_text())}
    assert names == {10: "dark", 11: "bright"}


def test_results_for_image_ids_of_text_can_be_scored(trained_folder: Path, sniper: CommandLine) -> None:
    content = json.loads((trained_folder / "train.json").read_text())
    for row in content["images"]:
        row["id"] = f"scene/{row['id']}"
    for row in content["annotations"]:
        row["image_id"] = f"scene/{row['image_id']}"
    path, output, drawn = (trained_folder / name for name in ("text.json", "found.json", "drawn"))
    path.write_text(json.dumps(content))
    sniper.json("predict", trained_folder / "run", "--annotations", path, "-o", output, "--draw", drawn)
    assert {entry["image_id"] for entry in json.loads(output.read_text())} == {
        f"scene/{number}" for number in range(1, 5)
    }
    assert len(list(drawn.glob("*.jpg"))) == 4
    assert sniper.json("evaluate", output, path)["num_images"] == 4


def test_annotations_without_a_known_category_are_refused(trained_folder: Path, sniper: CommandLine) -> None:
    other = write_with_categories(trained_folder, "other.json", {"dark": (1, "a"), "bright": (2, "b")})
    message = sniper.error("predict", trained_folder / "run", "--annotations", other)
    assert "have no category name in common: 'dark', 'bright' and 'a', 'b'" in message


def calibrate(folder: Path, **fields: object) -> None:
    """Write what a run has chosen on validation images."""
    run = Run.open(folder / "run")
    values: dict[str, Any] = {
        "step": int(run.checkpoints[-1].name),
        "num_images": 4,
        "num_compared": 0,
        "merge": "gaussian",
        "soft_nms_sigma": 0.55,
        "merge_iou": 0.5,
        "min_score": 0.5,
        "f1": 0.5,
        "precision": 0.5,
        "recall": 0.5,
    }
    save_calibration(run, Calibration(**(values | fields)))


@pytest.mark.parametrize(("min_score", "is_warned"), [("0.000001", True), ("0.999", False)])
def test_images_are_warned_of_where_detections_above_the_score_may_be_cut(
    trained_folder: Path, sniper: CommandLine, min_score: str, is_warned: bool
) -> None:
    search = ("predict", trained_folder / "run", "--limit", "2", "--predict.max_detections", "1")
    err = " ".join(sniper.text(*search, "--min-score", min_score).err.split())
    message = (
        "warning: 2 images have as many detections of at least 1e-06 as predict.max_detections allows (1)"
    )
    assert (message in err) is is_warned


def test_the_score_of_the_run_decides_what_is_shown(trained_folder: Path, sniper: CommandLine) -> None:
    search = ("predict", trained_folder / "run")
    before = sniper.json(*search)
    assert before["min_score"] == 0.3
    warned = "chosen no score on validation images, so pictures show detections from 0.3 on"
    drawn = (*search, "--draw", trained_folder / "drawn")
    assert warned in " ".join(sniper.text(*drawn).err.split())
    found = json.loads((trained_folder / "run" / "detections.json").read_text())
    best = max(entry["score"] for entry in found)
    calibrate(trained_folder, min_score=best / 2)
    after = sniper.json(*search)
    assert after["min_score"] == best / 2
    assert after["num_detections"] == before["num_detections"]  # the file has all
    assert 0 < after["num_shown"] < after["num_detections"]
    assert sniper.json(*search, "--min-score", "0.999")["num_shown"] == 0
    assert warned not in " ".join(sniper.text(*drawn).err.split())


def test_fields_of_prediction_are_set_by_options(trained_folder: Path, sniper: CommandLine) -> None:
    output = trained_folder / "found.json"
    search = ("predict", trained_folder / "run", "-o", output)
    plain = sniper.json(*search)["num_detections"]
    image = trained_folder / "images" / "train_0.png"
    few = sniper.json(
        *search,
        "--predict.max_detections=2",
        image,
        "--predict.levels",
        "[{factor: 1}]",
        "--predict.merge",
        "hard",
    )
    assert (few["num_images"], few["num_detections"]) == (1, 2)
    assert {entry["file_name"] for entry in json.loads(output.read_text())} == {str(image)}
    assert sniper.json(*search)["num_detections"] == plain > 2


def test_the_way_to_merge_that_the_run_has_chosen_is_used(trained_folder: Path, sniper: CommandLine) -> None:
    def found(*options: str) -> bytes:
        output = trained_folder / "found.json"
        sniper.json("predict", trained_folder / "run", "-o", output, *options)
        return output.read_bytes()

    calibrate(trained_folder, merge="hard", merge_iou=0.2)
    hard = found("--predict.merge", "hard", "--predict.merge_iou", "0.2")
    assert found("--predict.merge", "auto") == hard
    assert found() != hard  # the experiment sets gaussian


@pytest.mark.parametrize("image_id", [-(2**62), 2**62, 0])
def test_results_have_ids_of_any_size(trained_folder: Path, sniper: CommandLine, image_id: int) -> None:
    content = json.loads((trained_folder / "train.json").read_text())
    for row in content["images"]:
        row["id"] += image_id
    for row in content["annotations"]:
        row["image_id"] += image_id
    path = trained_folder / "other.json"
    path.write_text(json.dumps(content))
    output, drawn = trained_folder / "found.json", trained_folder / "drawn"
    sniper.json("predict", trained_folder / "run", "--annotations", path, "-o", output, "--draw", drawn)
    assert {entry["image_id"] for entry in json.loads(output.read_text())} == {
        row["id"] for row in content["images"]
    }
    assert len(list(drawn.glob("*.jpg"))) == 4
    plain = sniper.json("evaluate", output, path)
    assert plain["num_images"] == 4


@pytest.mark.parametrize("name", ["\udcb2\udce2.png", "\x1b[31m.png", "[bold]x[red].png", "图.png"])
def test_files_of_any_name_are_searched_or_named(
    trained_folder: Path, sniper: CommandLine, name: str
) -> None:
    folder = trained_folder / "photos"
    folder.mkdir()
    shutil.copy(trained_folder / "images" / "train_0.png", folder / name)
    output, drawn = trained_folder / "found.json", trained_folder / "drawn"
    printed = sniper.text("predict", trained_folder / "run", folder, "-o", output, "--draw", drawn)
    assert "\x1b" not in printed.out + printed.err
    names = {entry["file_name"] for entry in json.loads(output.read_text())}
    assert names == {str(folder / name)}
    assert len(list(drawn.iterdir())) == 1
    (folder / name).write_bytes(b"no image")
    message = sniper.error("predict", trained_folder / "run", folder, "-o", output)
    assert "no image is there; passed over 1 with the suffix but not the content of an image" in message
    assert "\x1b" not in message
    assert printable(name) in message


def test_a_checkpoint_of_another_model_is_refused(trained_folder: Path, sniper: CommandLine) -> None:
    config = trained_folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace("hidden_dim: 32", "hidden_dim: 48"))
    message = sniper.error("predict", trained_folder / "run", trained_folder / "images" / "train_0.png")
    assert "does not fit the model: roi_head.first.weight is (32, 392), not (48, 392)" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none x.png", "there is no run"),
        ("run x.png --annotations train.json", "not both"),
        ("run images --images images", "--images requires --annotations"),
        ("run images -o images", "images: expected a file to write"),
        ("run images -o train.json", "train.json: is no result file, and would be replaced"),
        ("run images/train_0.png --draw train.json", "exists"),
        ("run train.json", "train.json: is no image; the images of a data set are searched by --annotations"),
        ("run images/train_0.png --device abacus", "device abacus: there is no such device"),
        ("run x.png --bogus 3", "--bogus: sniper predict has no such option; it has"),
        ("run -x x.png", "-x: sniper predict has no such option"),
        ("run x.png --conf 0.5", "--conf: no such option; use --min-score"),
        ("run x.png --iou=0.5", "--iou: no such option; use --predict.merge_iou"),
        ("run x.png --max-detections 3", "--max-detections: no such option; use --predict.max_detections"),
        ("run x.png --train.epochs 3", "--train.epochs: sniper predict has no such option"),
        ("run x.png --predict.merge", "--predict.merge: the value is missing"),
        ("run x.png --predict.merge best", "--predict.merge: must be 'auto', 'gaussian', 'linear', 'hard'"),
        ("run x.png --min-score 2", "Must be <= 1"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    trained_folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(trained_folder)
    assert message in sniper.error("predict", *arguments.split())


def test_xml_of_annotations_is_refused_without_messages_of_openvino(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "annotations.xml"
    path.write_text("<annotations><version>1.1</version></annotations>")
    assert run_command(["predict", str(path), str(tmp_path)]) == 2
    error = capfd.readouterr().err
    expected = "is no OpenVINO model; expected the .xml of one that sniper export has written"
    assert " ".join(error.split()) == f"error: {path}: {expected}"


@pytest.mark.parametrize("command", [("export", "a.onnx", "b.xml"), ("focus", "a.onnx"), ("mine", "a.pt2")])
def test_commands_that_need_a_run_refuse_an_exported_model(
    tmp_path: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(command[1]).write_text("")
    expected = f"{command[1]}: there is no run; expected its folder, not an exported model"
    assert expected in sniper.error(*command)


def test_a_run_is_not_read_from_a_url(sniper: CommandLine) -> None:
    for command in ("focus", "export"):
        arguments = ("https://127.0.0.1:9/run", "a.onnx")[: 1 + (command == "export")]
        assert "/run: a run is not read from a URL" in sniper.error(command, *arguments)


def test_an_unreadable_image_is_reported_with_the_way_to_skip_it(
    trained_folder: Path, sniper: CommandLine
) -> None:
    run, photos = trained_folder / "run", trained_folder / "photos"
    photos.mkdir()
    for image in (trained_folder / "images").iterdir():
        shutil.copy(image, photos)
    cut = photos / "cut.png"
    cut.write_bytes(image.read_bytes()[:60])
    answer = sniper.error("predict", run, photos)
    assert "cut.png: cannot be read as an image" in answer
    assert f"set data.on_bad_image to skip in {run / 'config.yaml'}, and continue with --resume" in answer
    config = (run / "config.yaml").read_text()
    assert "on_bad_image: refuse" in config
    (run / "config.yaml").write_text(config.replace("on_bad_image: refuse", "on_bad_image: skip"))
    with pytest.warns(UserWarning, match="cut.png: .*skipped"):
        printed = sniper.text("predict", run, photos, "--resume")
    assert re.search(r"^not readable +.*cut.png$", printed.out, re.MULTILINE)
    assert "next:" not in printed.out


def test_a_search_of_the_validation_images_names_what_is_next(
    trained_folder: Path, sniper: CommandLine
) -> None:
    run, drawn = trained_folder / "run", trained_folder / "drawn"
    printed = sniper.text("predict", run, "--draw", drawn)
    assert re.search(rf"^pictures +{re.escape(str(drawn))}$", printed.out, re.MULTILINE)
    assert f"next: sniper evaluate {run}" in printed.out
    assert "not readable" not in printed.out


def test_the_checkpoint_can_be_chosen(trained_folder: Path, sniper: CommandLine) -> None:
    run = trained_folder / "run"
    (newest,) = (run / "checkpoints").iterdir()
    best = newest.with_name("00000000")
    shutil.copytree(newest, best)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "evaluate", "step": 0, "epoch": 0.1, "ap": 0.25, "num_images": 4}\n')
    search = ("predict", run, "--limit", 1)
    printed = sniper.text(*search)
    assert "checkpoint: step 0, AP 0.250 on 4 validation images; the newest is 1" in printed.err
    assert "checkpoint: step 1\n" in sniper.text(*search, "--checkpoint", "last").err
    assert "checkpoint: step 0" in sniper.text(*search, "--checkpoint", 0).err
    assert "there is no checkpoint of step 7" in sniper.error(*search, "--checkpoint", 7)
    scored = sniper.text("evaluate", run, "--checkpoint", "last")
    assert "checkpoint: step 1\n" in scored.err
    assert "the newest is 1 (--checkpoint last)" in sniper.text("evaluate", run).err
    assert "--checkpoint" in sniper.error(*search, "--checkpoint", "worst")


def test_georeferenced_images_are_also_written_as_geojson_and_geopackage(
    trained_folder: Path, sniper: CommandLine
) -> None:
    with Image.open(trained_folder / "images" / "train_0.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    images = [
        write_geotiff(trained_folder / "geo" / "a.tif", pixels),
        trained_folder / "images" / "train_1.png",
        write_geotiff(trained_folder / "geo" / "b.tif", pixels, crs=None),
    ]
    found = trained_folder / "found.json"
    search = ("predict", trained_folder / "run", *images, "-o", found, "--min-score", 0)
    printed = sniper.text(*search, "--gpkg", "--json")
    result = json.loads(printed.out)
    assert result["geojson"] == str(found.with_suffix(".geojson"))
    assert result["gpkg"] == str(found.with_suffix(".gpkg"))
    assert "b.tif: has a geotransform, but no CRS" in printed.err
    features = json.loads(found.with_suffix(".geojson").read_text())["features"]
    assert {feature["properties"]["image"] for feature in features} == {str(images[0])}
    entries = [entry for entry in json.loads(found.read_text()) if entry["file_name"] == str(images[0])]
    assert 0 < len(features) <= len(entries)
    assert pyogrio.read_info(found.with_suffix(".gpkg"))["features"] == len(features)
    assert "is GeoJSON, which has the detections to look at" in sniper.error(
        "evaluate", found.with_suffix(".geojson"), trained_folder / "train.json"
    )
    result = sniper.json("predict", trained_folder / "run", images[1], "-o", found)
    assert result["geojson"] is None
    assert not found.with_suffix(".geojson").exists()


def test_geojson_of_others_is_not_replaced(trained_folder: Path, sniper: CommandLine) -> None:
    image = write_geotiff(trained_folder / "a.tif")
    (trained_folder / "a.geojson").write_text("{}")
    search = ("predict", trained_folder / "run", image, "-o")
    assert "was not written by sniper predict" in sniper.error(*search, trained_folder / "a.json")
    assert "expected the COCO result file" in sniper.error(*search, trained_folder / "a.geojson")
    assert (trained_folder / "a.geojson").read_text() == "{}"


def test_a_detector_of_torchvision_searches_without_a_run(
    trained_folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weights = trained_folder / "ssd.pth"
    torch.save(ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).state_dict(), weights)
    monkeypatch.chdir(trained_folder)
    options = ("--detector", f"torchvision:ssdlite320_mobilenet_v3_large@{weights}", "--device", "cpu")
    level = ("--predict.levels", "[{factor: 1.0}]")
    result = sniper.json("predict", *options, "images/train_0.png", *level)
    assert result["detector"] == options[1]
    assert (result["num_images"], result["output"]) == (1, "detections.json")
    assert result["num_detections"] > 0
    entries = json.loads((trained_folder / "detections.json").read_text())
    assert {entry["category_name"] for entry in entries} <= set(COCO_NAMES)
    truth = json.loads((trained_folder / "train.json").read_text())
    truth["categories"][0]["name"] = "person"
    (trained_folder / "train.json").write_text(json.dumps(truth))
    annotations = ("--annotations", "train.json", "--images", "images", "--limit", "1", "-o", "coco.json")
    assert sniper.json("predict", *options, *annotations, *level)["num_images"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "RUN is missing: expected the folder of a run first, or --detector"),
        ("--predict.merge hard run", "RUN is missing: expected the folder of a run first"),
        (
            "--detector yolo images",
            "--detector yolo: expected torchvision:NAME, torchvision:NAME@FILE or transformers:NAME",
        ),
        ("--detector torchvision:fcos_resnet50 images", "did you mean fcos_resnet50_fpn"),
        ("--detector torchvision:fcos_resnet50_fpn@none.pth images", "none.pth: no such file"),
        ("--detector torchvision:fcos_resnet50_fpn", "needs images: files, folders or --annotations"),
        ("--detector torchvision:fcos_resnet50_fpn images --checkpoint last", "--checkpoint: is of a run"),
        (
            "--detector torchvision:fcos_resnet50_fpn images --engine onnx",
            "--engine onnx: chooses what runs the detector of a run; --detector is run by torch",
        ),
        (
            "run --detector torchvision:fcos_resnet50_fpn images",
            "searches in place of a run; leave out run, or --detector",
        ),
        ("a.onnx images --engine openvino", "or export that for openvino"),
        ("a.bin images", "a.bin: has the weights of an exported model; name the file beside it, a.xml"),
        ("b.bin images", "or a model that sniper export has written (.onnx, .xml, .pt2)"),
        (
            "run train.json",
            "train.json: is no image; the images of a data set are searched by --annotations train.json",
        ),
        (
            "https://127.0.0.1:9/a.onnx images",
            "https://127.0.0.1:9/a.onnx: runs and models are not read from URLs",
        ),
        ("https://127.0.0.1:9/run images", "/run: runs and models are not read from URLs; download it first"),
    ],
)
def test_a_detector_that_cannot_search_is_refused(
    trained_folder: Path,
    sniper: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(trained_folder)
    for name in ("a.onnx", "a.xml", "a.bin", "b.bin"):
        Path(name).write_text("<annotations/>")
    assert message in sniper.error("predict", *arguments.split())


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ((), {"model": {"mask_head": {}}}, "a detector that predicts masks cannot be exported"),
        (
            ("--predict.focus", "{min_score: 0.4, window: 128, cues: head}"),
            {},
            "the focus head is no part of an exported graph",
        ),
        (("--int8", "train.json"), {"data": {"test": {}}}, "--int8: needs validation images"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_weights_are_read(
    trained_folder: Path,
    sniper: CommandLine,
    options: tuple[str, ...],
    changes: dict[str, dict[str, Any]],
    message: str,
) -> None:
    folder = trained_folder / "run"
    shutil.rmtree(folder / "checkpoints")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for section, values in changes.items():
        config[section] |= values
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert message in sniper.error("export", folder, trained_folder / "a.onnx", *options)
