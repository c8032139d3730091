"""`sniper check`: every pixel is read, every problem is reported."""

from pathlib import Path

from tests.cli.commands import CommandLine


def test_a_good_data_set_is_counted(folder: Path, sniper: CommandLine) -> None:
    result = sniper.json("check", folder / "train.json", "--images", folder / "images")
    assert (result["num_images"], result["num_boxes"]) == (4, 12)


def test_all_bad_images_are_reported_at_once(folder: Path, sniper: CommandLine) -> None:
    truncated = folder / "images" / "train_1.png"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    (folder / "images" / "train_3.png").unlink()
    message = sniper.error("check", folder / "train.json")
    assert "2 bad images" in message
    assert "train_1.png: cannot be read as an image" in message
    assert "train_3.png does not exist" in message


def test_an_absent_image_folder_is_refused(folder: Path, sniper: CommandLine) -> None:
    message = sniper.error("check", folder / "train.json", "--images", folder / "none")
    assert message.endswith("none: no such folder")
