"""`sniper check`: every pixel is read, every problem is reported."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.commands import CommandLine
from tests.data.datasets.layouts import write_files


def test_a_good_data_set_is_counted(folder: Path, sniper: CommandLine) -> None:
    result = sniper.json("check", folder / "train.json", "--images", folder / "images")
    assert (result["num_images"], result["num_boxes"]) == (4, 12)


def test_the_objects_crowds_and_images_of_each_class_are_counted(folder: Path, sniper: CommandLine) -> None:
    coco = json.loads((folder / "train.json").read_text())
    coco["annotations"][0]["iscrowd"] = 1
    coco["categories"].append({"id": 1_000, "name": "without objects"})
    (folder / "train.json").write_text(json.dumps(coco))
    names = {each["id"]: each["name"] for each in coco["categories"]}
    objects = [each for each in coco["annotations"] if not each["iscrowd"]]
    expected = [
        {
            "name": name,
            "num_objects": sum(each["category_id"] == category_id for each in objects),
            "num_crowds": int(coco["annotations"][0]["category_id"] == category_id),
            "num_images": len(
                {a["image_id"] for a in coco["annotations"] if a["category_id"] == category_id}
            ),
        }
        for category_id, name in sorted(names.items())
    ]
    assert sniper.json("check", folder / "train.json")["classes"] == expected
    text = sniper.text("check", folder / "train.json").out
    assert f"4 images with 11 objects and 1 crowd of {len(names)} classes; all images can be read" in text
    assert text.rstrip().endswith(f"plan:  sniper plan {folder / 'train.json'}")


def test_the_next_command_has_the_options_that_were_given(folder: Path, sniper: CommandLine) -> None:
    config = folder / "read.yaml"
    config.write_text("data: {read: {intensity_range: [0, 4095]}}\n")
    options = ["--images", str(folder / "images"), "--config", str(config), "--follow-links"]
    text = sniper.text("check", folder / "train.json", *options).out
    assert text.rstrip().endswith(
        f"plan:  {shlex.join(['sniper', 'plan', str(folder / 'train.json'), *options])}"
    )


@pytest.mark.parametrize("command", ["check", "plan"])
def test_a_reason_that_many_images_share_is_given_once(
    tmp_path: Path, sniper: CommandLine, command: str
) -> None:
    for name in "abcde":
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 9000, dtype=np.uint16)).save(tmp_path / "images" / f"{name}.png")
    labels = {f"labels/{name}.txt": "0 0.5 0.5 0.2 0.4\n" for name in "abcde"}
    write_files(tmp_path, {"classes.txt": "cat\n", **labels})
    message = " ".join(sniper.error(command, tmp_path).split())
    assert message.count("has more than 8 bits a channel") == 1
    assert message.count(".png: likewise") == 4
    assert "data.read is set in an experiment file (--config FILE)" in message


def test_all_bad_images_are_reported_at_once(folder: Path, sniper: CommandLine) -> None:
    truncated = folder / "images" / "train_1.png"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    (folder / "images" / "train_3.png").unlink()
    message = sniper.error("check", folder / "train.json")
    assert "2 bad images" in message
    assert "train_1.png: cannot be read as an image" in message
    assert "train_3.png does not exist" in message


def test_bad_images_of_formats_without_sides_are_reported_too(tmp_path: Path, sniper: CommandLine) -> None:
    files: dict[str, str | None] = {"images/a.jpg": None, "images/b.jpg": "no image", "classes.txt": "cat\n"}
    labels = {f"labels/{name}.txt": "0 0.5 0.5 0.2 0.4\n" for name in "ab"}
    message = sniper.error("check", write_files(tmp_path, {**files, **labels}))
    assert "1 bad image " in message
    assert "images/b.jpg: cannot be read as an image" in message
    (tmp_path / "images" / "a.jpg").write_bytes(b"")
    assert "2 bad images " in sniper.error("check", tmp_path)


def test_an_absent_image_folder_is_refused(folder: Path, sniper: CommandLine) -> None:
    message = sniper.error("check", folder / "train.json", "--images", folder / "none")
    assert message.endswith("none: no such folder")
