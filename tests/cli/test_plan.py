"""`sniper plan`: a page, tables, and an experiment that trains."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sniper.config.loading import load_experiment
from tests.cli.commands import CommandLine

FIGURES = {
    "num_images", "num_boxes", "chips_per_image", "chips_per_level", "megapixels_per_image", "pixel_ratio_800x1333",
    "uncovered_boxes", "moved_boxes", "seconds",
}  # fmt: skip


def test_a_plan_suggests_an_experiment_that_trains(folder: Path, sniper: CommandLine) -> None:
    annotations, config = folder / "train.json", folder / "experiment.yaml"
    suggested = folder / "plan" / "suggested.yaml"
    plan = sniper.json(
        *("plan", annotations, "--config", config, "-o", folder / "plan"), "--share", 0.9, "--levels", 2
    )
    assert plan.keys() >= FIGURES
    assert plan["uncovered_boxes"] == 0
    assert (folder / "plan" / "plan.html").is_file()
    spec = load_experiment(suggested)
    assert len(spec.pyramid.levels) == len(plan["suggestions"][0]["levels"]) == 2
    assert spec.train == load_experiment(config).train

    table = folder / "chips.npz"
    chips = sniper.json("chips", annotations, "-o", table, "--config", suggested)
    assert chips.keys() >= FIGURES
    assert chips["chips_per_image"] == plan["suggestions"][0]["chips_per_image"]
    options = ("--data.chips", table, "--train.epochs", "0.5")
    assert sniper.json("train", suggested, "--run", folder / "run", *options)["step"] > 0
    assert "another pyramid" in sniper.error("train", config, "--run", folder / "other", *options)


def test_a_file_of_some_fields_is_kept_and_the_rest_is_suggested(folder: Path, sniper: CommandLine) -> None:
    config = folder / "some.yaml"
    config.write_text("train: {batch_size: 3}\nmodel: {backbone: {pretrained: false}}\n")
    suggestion = sniper.json("plan", folder / "train.json", "-o", folder / "plan")["suggestions"][0]
    plan = sniper.json("plan", folder / "train.json", "--config", config, "-o", folder / "kept")
    assert plan["suggestions"][0] == suggestion
    assert (
        plan["chips_per_image"] == suggestion["chips_per_image"]
    )  # of the suggestion, not of the paper's pyramid
    assert plan["batch_size"] == 3
    spec = load_experiment(folder / "kept" / "suggested.yaml")
    assert (spec.train.batch_size, spec.model.backbone.pretrained) == (3, False)
    assert spec.model == replace(
        load_experiment(folder / "plan" / "suggested.yaml").model, backbone=spec.model.backbone
    )
    config.write_text("pyramid: {chip_size: 384}\ndata: {read: {intensity_range: [0, 1000]}}\n")
    sniper.json("plan", folder / "train.json", "--config", config, "-o", folder / "kept")
    spec = load_experiment(folder / "kept" / "suggested.yaml")
    assert (spec.pyramid.chip_size, spec.data.read.intensity_range) == (384, (0, 1000))
    config.write_text("train: {batch_size: 3}\nmodel: {kind: torchvision, name: fcos}\n")
    plan = sniper.json(
        "plan", folder / "train.json", "--config", config, "-o", folder / "kept", "--batch-size", 5
    )
    assert plan["batch_size"] == 5  # the option comes before the file
    assert load_experiment(folder / "kept" / "suggested.yaml").model.name == "fcos"


def test_a_plan_is_printed_as_tables(
    folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    out = sniper.text("plan", "train.json", "--config", "experiment.yaml").out
    plan = Path("plans") / f"{folder.name}_train"
    for text in (
        "12 boxes to cover",
        "up to",
        "one pass at 800×1333",
        "suggested",
        "in the experiment",
        str(plan / "plan.html"),
        f"sniper train {plan / 'suggested.yaml'} --run runs/{plan.name}",
    ):
        assert text in out
    assert (plan / "suggested.yaml").is_file()


def test_a_plan_without_options_is_trained_from_the_data_set(
    folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert "\ntrain:  sniper train train.json\n" in sniper.text("plan", "train.json").out
    page = (Path("plans") / f"{folder.name}_train" / "plan.html").read_text()
    assert "<pre>sniper train train.json</pre>" in page
    assert "sniper predict runs/train IMAGES" in page
    changed = sniper.text("plan", "train.json", "--levels", "2", "-o", "two").out
    assert "\ntrain:  sniper train two/suggested.yaml --run runs/two\n" in changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-o train.json", "exists"),
        ("--useful-sizes 48 32", "--useful-sizes: expected two sizes, the smaller first, not 48 32"),
        ("--images none", "--images none: no such folder"),
        ("--proposals images -o plan", "no proposals"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    assert message in sniper.error("plan", "train.json", *options.split())


def test_steps_are_measured_on_request(
    folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    options = ("--config", "experiment.yaml", "--measure", "--device", "cpu")
    assert sniper.json("plan", "train.json", *options)["measured"]["seconds_per_step"] > 0
    assert "minutes per epoch" in sniper.text("plan", "train.json", *options).out


def test_a_plan_of_images_without_boxes_gives_the_reason(folder: Path, sniper: CommandLine) -> None:
    content = json.loads((folder / "train.json").read_text())
    (folder / "empty.json").write_text(json.dumps(content | {"annotations": []}))
    out = sniper.text("plan", folder / "empty.json", "-o", folder / "plan").out
    assert "no pyramid is suggested: there are no boxes to learn from" in out


def test_a_plan_for_a_cluster_is_printed_and_on_the_page(folder: Path, sniper: CommandLine) -> None:
    given = ("--gpus", "8x8", "--chips-per-second", "200", "-o", folder / "plan")
    out = sniper.text("plan", folder / "train.json", *given).out
    assert "8 machines of 8 GPUs: " in out
    assert "at 200 chips a second and GPU (given)" in out
    assert "On a cluster" in (folder / "plan" / "plan.html").read_text()
    cluster = sniper.json("plan", folder / "train.json", *given)["cluster"]
    assert (cluster["gpus"], cluster["source"]) == (64, "given")
    assert cluster["cores_per_machine"] >= 1


def test_a_speed_without_gpus_is_refused(folder: Path, sniper: CommandLine) -> None:
    message = sniper.error("plan", folder / "train.json", "--chips-per-second", "200")
    assert "--chips-per-second: is of the GPUs of --gpus, which is missing" in message
