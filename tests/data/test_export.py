"""Negative chips for other trainers: images that show no object, with the pixels that are trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sniper.chips import ChipTable, LevelSpec, PyramidSpec
from sniper.chips.image_boxes import ImageBoxes, ScoredBoxes
from sniper.chips.negatives import NegativeSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.write import FormatName
from sniper.data.export import EmptyChips, WrittenChips, choose_empty_chips, write_empty_chips
from sniper.data.reader import ChipReader
from sniper.data.spec import DataSpec
from sniper.errors import ConfigError, ImageError
from sniper.geometry.boxes import intersections
from tests.data.tiny import write_dataset

PYRAMID = PyramidSpec(
    chip_size=64, stride=16, levels=(LevelSpec(factor=1.5, below=40), LevelSpec(long_side=64, at_least=10))
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Return images of which the last has no object and is smaller than a chip."""
    path = write_dataset(
        tmp_path / "source", sides=((160, 120), (96, 200), (200, 200), (50, 30)), boxes_per_image=2
    )
    content = json.loads(path.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 4]
    path.write_text(json.dumps(content))
    return load_dataset(path)


def alarms_in(dataset: Dataset, *, count: int = 30) -> ScoredBoxes:
    rng = np.random.default_rng(1)
    sides = np.repeat(np.stack([dataset.widths, dataset.heights], axis=1), count, axis=0)  # (n, 2)
    low = rng.uniform(0, 0.9, sides.shape)
    high = np.minimum(low + rng.uniform(0.02, 0.1, sides.shape), 1)
    images = ImageBoxes(
        widths=dataset.widths.astype(np.int64),
        heights=dataset.heights.astype(np.int64),
        offsets=np.arange(len(dataset) + 1) * count,
        boxes=np.concatenate([low * sides, high * sides], axis=1),
        is_required=np.ones(len(sides), dtype=np.bool_),
    )
    return ScoredBoxes(images=images, scores=rng.uniform(0.1, 1, len(sides)))


def choose(dataset: Dataset, *, dose: float = 10.0, seed: int = 0) -> EmptyChips:
    return choose_empty_chips(
        dataset,
        alarms_in(dataset),
        NegativeSpec(),
        dose=dose,
        pyramid=PYRAMID,
        generator=np.random.default_rng(seed),
    )


def write(
    dataset: Dataset, table: ChipTable, folder: Path, *, to: FormatName = "coco", data: DataSpec = DataSpec()
) -> WrittenChips:
    return write_empty_chips(dataset, table, folder, to=to, data=data, on_progress=lambda done, total: None)


def windows_of(table: ChipTable) -> list[tuple[int, ...]]:
    columns = (table.image_indices, table.level, table.x, table.y)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_chips_show_no_part_of_an_object_or_crowd(dataset: Dataset) -> None:
    dataset.is_crowd[::3] = True
    chips = choose(dataset)
    assert len(chips.table) == chips.num_windows - chips.num_with_objects > 0
    assert chips.num_with_objects > 0
    for index in range(len(chips.table)):
        chip = chips.table.chip(index)
        boxes = dataset[int(chips.table.image_indices[index])].boxes
        window = chip.level.to_image(chip.window[None])
        assert intersections(window, boxes).max(initial=0) == 0


def test_the_dose_limits_chips_by_the_number_of_positive_chips(dataset: Dataset) -> None:
    everything, some = choose(dataset), choose(dataset, dose=0.5)
    assert len(some.table) == int(0.5 * some.num_positives) < len(everything.table)
    assert set(windows_of(some.table)) < set(windows_of(everything.table))
    assert windows_of(choose(dataset, dose=0.5).table) == windows_of(some.table)


@pytest.mark.parametrize("to", ["coco", "yolo", "voc"])
def test_written_chips_have_the_pixels_that_are_trained_on(
    dataset: Dataset, tmp_path: Path, to: FormatName
) -> None:
    table = choose(dataset).table
    written = write(dataset, table, tmp_path / "out", to=to)
    assert (written.num_chips, written.skipped_images, written.warnings) == (len(table), (), ())
    read = load_dataset(tmp_path / "out")
    assert len(read) == len(table)
    assert len(read.boxes) == 0
    if to != "voc":  # whose files have no list of classes
        assert [category.name for category in read.categories] == ["dark", "bright"]
    pixels = {record.path.name: np.asarray(Image.open(record.path)) for record in read}
    reader, num_padded = ChipReader(), 0
    for index in range(len(table)):
        chip, record = table.chip(index), dataset[int(table.image_indices[index])]
        x1, y1, x2, y2 = chip.level.to_image(chip.window[None])[0].round().astype(int)
        x2, y2 = min(x2, record.width), min(y2, record.height)
        name = f"{Path(record.file_name).stem}_level{table.level[index]}_{x1}_{y1}_{x2}_{y2}.png"
        expected = reader.read_record(record, chip)
        width, height = chip.visible
        num_padded += (width, height) != (chip.width, chip.height)
        assert not expected[height:].any()
        assert not expected[:, width:].any()
        np.testing.assert_array_equal(pixels.pop(name), expected[:height, :width])
    assert not pixels
    assert num_padded > 0


def test_images_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, sides=((200, 200), (200, 200), (200, 200)), boxes_per_image=1)
    text = path.read_text()
    for number, name in enumerate(("x/a.png", "y/a.png", "y/a.bmp")):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        Image.open(tmp_path / "images" / f"train_{number}.png").save(tmp_path / "images" / name)
        text = text.replace(f"train_{number}.png", name)
    path.write_text(text)
    dataset = load_dataset(path)
    # The same window of each image, whatever it shows.
    first = choose(dataset).table.select(np.array([0]))
    table = ChipTable.concatenate([first.of_images(range(1))] * 3)
    written = write(dataset, table, tmp_path / "out", to="yolo")
    read = load_dataset(tmp_path / "out")
    assert len({str(record.path) for record in read}) == written.num_chips == 3
    (warning,) = written.warnings
    assert warning.startswith("images renamed: 1 (y/a_level")
    names = {str(record.path.relative_to(tmp_path / "out" / "images").parent) for record in read}
    assert names == {"x", "y"}


def test_an_image_that_cannot_be_read_is_refused_or_skipped(dataset: Dataset, tmp_path: Path) -> None:
    table = choose(dataset).table
    bad = dataset[int(table.image_indices[0])].path
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ImageError, match=bad.name):
        write(dataset, table, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    written = write(dataset, table, tmp_path / "out", data=DataSpec(on_bad_image="skip"))
    assert written.skipped_images == (bad,)
    expected = int((table.image_indices != table.image_indices[0]).sum())
    assert len(load_dataset(tmp_path / "out")) == written.num_chips == expected > 0


def test_a_folder_with_files_is_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source: is not empty, expected a new folder"):
        write(dataset, choose(dataset).table, tmp_path / "source")
