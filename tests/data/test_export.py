"""Chips for other trainers: images with the pixels that are trained on, annotations, and a way to continue."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sniper.chips import ChipTable, LevelSpec, PyramidSpec
from sniper.chips.image_boxes import ImageBoxes, ScoredBoxes
from sniper.chips.negatives import NegativeSpec
from sniper.data.chip_labels import ChipFileSpec
from sniper.data.chip_manifest import read_manifest
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.write import FormatName
from sniper.data.epoch import choose_positive_chips
from sniper.data.export import ChipExport, ChipSplit, EmptyChips, WrittenChips, choose_empty_chips
from sniper.data.reader import ChipReader
from sniper.data.spec import DataSpec
from sniper.errors import ConfigError, ImageError
from sniper.geometry.boxes import Sides, area, intersections, iou
from sniper.geometry.masks import MaskArrays, rasterize
from tests.data.masked import write_masked_dataset
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
    """Write negative chips as `sniper mine --to` does."""
    spec = ChipFileSpec(to=to, encoding="png", ignored="keep", is_padded=False)
    return export({"": ChipSplit(dataset=dataset, tables=(table,))}, folder, spec, data=data)


def export(
    splits: dict[str, ChipSplit], folder: Path, spec: ChipFileSpec, *, data: DataSpec = DataSpec()
) -> WrittenChips:
    export = ChipExport(splits, folder, spec, data=data)
    assert export.find_written() is None
    export.start()
    export.write(on_progress=lambda done, total: None)
    return export.finish()


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
    assert (written.counts["num_chips"], written.skipped_images, written.warnings) == (len(table), (), ())
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
    table = replace(table, moved_to=np.full(len(dataset.boxes), -1, dtype=np.int8))
    written = write(dataset, table, tmp_path / "out", to="yolo")
    read = load_dataset(tmp_path / "out")
    assert len(read) == written.counts["num_chips"] == 3
    stems = sorted(record.path.stem for record in read)
    assert [stem.partition("_level")[0] for stem in stems] == ["x_a", "y_a", "y_a"]
    assert stems[2] == f"{stems[1]}_2"


def test_an_image_that_cannot_be_read_is_refused_or_skipped(dataset: Dataset, tmp_path: Path) -> None:
    table = choose(dataset).table
    bad = dataset[int(table.image_indices[0])].path
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ImageError, match=bad.name):
        write(dataset, table, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.parts", "source"]
    written = write(dataset, table, tmp_path / "out", data=DataSpec(on_bad_image="skip"))
    assert written.skipped_images == (bad,)
    expected = int((table.image_indices != table.image_indices[0]).sum())
    assert len(load_dataset(tmp_path / "out")) == written.counts["num_chips"] == expected > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_folder_with_files_is_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    table = choose(dataset).table
    with pytest.raises(ConfigError, match=r"source: is not empty, expected a new folder"):
        write(dataset, table, tmp_path / "source")
    (tmp_path / ".out.parts").mkdir()
    (tmp_path / ".out.parts" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=r"\.out\.parts: is in the way"):
        write(dataset, table, tmp_path / "out")


def test_the_same_chips_are_not_written_twice(dataset: Dataset, tmp_path: Path) -> None:
    table = choose(dataset).table
    written = write(dataset, table, tmp_path / "out")
    spec = ChipFileSpec(to="coco", encoding="png", ignored="keep", is_padded=False)
    split = ChipSplit(dataset=dataset, tables=(table,))
    again = ChipExport({"": split}, tmp_path / "out", spec, data=DataSpec()).find_written()
    assert again is not None
    assert again.counts == written.counts
    other = ChipExport({"": split}, tmp_path / "out", replace(spec, is_padded=True), data=DataSpec())
    with pytest.raises(ConfigError, match="has chips of other images or settings"):
        other.find_written()


@pytest.fixture
def positives(dataset: Dataset) -> ChipTable:
    return choose_positive_chips(dataset, PYRAMID, generator=np.random.default_rng(0))


def test_annotations_are_the_boxes_that_the_chip_shows(
    dataset: Dataset, positives: ChipTable, tmp_path: Path
) -> None:
    split = {"train": ChipSplit(dataset=dataset, tables=(positives,))}
    counts = export(split, tmp_path / "out", ChipFileSpec(to="coco", encoding="png")).counts
    assert counts["objects_in_no_chip"] == 0
    read, manifest = load_dataset(tmp_path / "out"), read_manifest(tmp_path / "out")
    assert [category.category_id for category in read.categories] == [10, 11]
    assert len(manifest.chips) == len(read) == len(positives)
    for index, (record, entry) in enumerate(zip(read, manifest.chips, strict=True)):
        source = next(each for each in dataset if each.image_id == entry.image_id)
        chip = positives.chip(index)
        assert (record.image_id, record.path.name) == (entry.chip_id, Path(entry.file_name).name)
        assert (record.width, record.height) == (chip.width, chip.height) == (entry.width, entry.height)
        boxes = chip.clip(chip.to_chip(source.boxes))
        kept = area(boxes) >= 0.1 * area(chip.to_chip(source.boxes))
        np.testing.assert_allclose(record.boxes, boxes[kept], atol=1e-6)
        np.testing.assert_array_equal(record.labels, source.labels[kept])
        back = entry.chip.to_image(record.boxes[~record.is_crowd])
        overlaps = iou(back, source.boxes)
        assert (overlaps.max(axis=1, initial=1.0) > 0.09).all()
        x1, y1, x2, y2 = entry.image_box
        assert 0 <= x1 < x2 <= source.width
        assert 0 <= y1 < y2 <= source.height
        visible = chip.visible
        assert (x2 - x1) * entry.scale == pytest.approx(visible.width, rel=0.02)
        assert (y2 - y1) * entry.scale == pytest.approx(visible.height, rel=0.02)


@pytest.mark.parametrize("to", ["yolo", "voc", "coco"])
def test_every_format_is_read_back_with_equal_boxes(
    dataset: Dataset, positives: ChipTable, tmp_path: Path, to: FormatName
) -> None:
    split = {"train": ChipSplit(dataset=dataset, tables=(positives,))}
    spec = ChipFileSpec(to=to, ignored="blur")
    counts = export(split, tmp_path / "out", spec).counts
    read = load_dataset(tmp_path / "out")
    assert len(read.boxes) == counts["num_labels"] > 0
    labels = {record.path.stem: (record.boxes, record.labels) for record in read}
    expected = export(split, tmp_path / "coco", replace(spec, to="coco")).counts
    assert expected == counts
    for record in load_dataset(tmp_path / "coco"):
        boxes, classes = labels[record.path.stem]
        np.testing.assert_allclose(boxes, record.boxes, atol=1e-4)
        if to == "yolo":
            np.testing.assert_array_equal(classes, record.labels)


def test_objects_out_of_range_are_annotated_blurred_or_their_chips_skipped(tmp_path: Path) -> None:
    dataset = load_dataset(write_dataset(tmp_path / "source", boxes_per_image=5))
    levels = (LevelSpec(factor=1.5, below=30), LevelSpec(long_side=64, at_least=30))
    narrow = PyramidSpec(chip_size=64, stride=16, levels=levels)
    table = choose_positive_chips(dataset, narrow, generator=np.random.default_rng(0))
    split = {"train": ChipSplit(dataset=dataset, tables=(table,))}
    spec = ChipFileSpec(to="coco", encoding="png", ignored="keep")
    labelled = export(split, tmp_path / "label", spec).counts
    blurred = export(split, tmp_path / "blur", replace(spec, out_of_range="blur")).counts
    skipped = export(split, tmp_path / "skip", replace(spec, out_of_range="skip")).counts
    assert labelled["out_of_range_labelled"] == blurred["out_of_range_blurred"] > 0
    assert labelled["num_labels"] - blurred["num_labels"] == labelled["out_of_range_labelled"]
    assert skipped["chips_skipped"] == labelled["num_chips"] - skipped["num_chips"] > 0
    assert skipped["out_of_range_labelled"] == 0
    num_changed = 0
    for before, after in zip(load_dataset(tmp_path / "label"), load_dataset(tmp_path / "blur"), strict=True):
        first, second = (np.asarray(Image.open(each.path)) for each in (before, after))
        is_changed = (first != second).any(axis=2)
        num_changed += len(before.boxes) > len(after.boxes)
        if len(before.boxes) == len(after.boxes):
            assert not is_changed.any()
        for x1, y1, x2, y2 in after.boxes.astype(int).tolist():
            assert not is_changed[y1:y2, x1:x2].any()
    assert num_changed > 0


def test_crowds_are_regions_to_ignore_or_blurred(
    dataset: Dataset, positives: ChipTable, tmp_path: Path
) -> None:
    dataset.is_crowd[::2] = True
    split = {"train": ChipSplit(dataset=dataset, tables=(positives,))}
    export(split, tmp_path / "crowd", ChipFileSpec(to="coco", min_visible_side=0, min_visibility=0))
    crowds = load_dataset(tmp_path / "crowd")
    assert crowds.is_crowd.any()
    assert not crowds.is_crowd.all()
    export(split, tmp_path / "blur", ChipFileSpec(to="yolo", ignored="blur"))
    with pytest.raises(ConfigError, match="--ignored crowd: YOLO has no regions to ignore"):
        ChipExport(split, tmp_path / "no", ChipFileSpec(to="yolo"), data=DataSpec())


@pytest.mark.parametrize("num_written", [0, 3])
def test_a_stopped_export_continues_to_equal_bytes(
    dataset: Dataset, positives: ChipTable, tmp_path: Path, num_written: int
) -> None:
    split, spec = {"train": ChipSplit(dataset=dataset, tables=(positives,))}, ChipFileSpec(to="coco")
    export(split, tmp_path / "whole", spec)
    first = ChipExport(split, tmp_path / "out", spec, data=DataSpec())
    first.start()

    def stop(num_done: int, num_chips: int) -> None:
        if num_done > num_written:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.write(on_progress=stop)
    leftover = tmp_path / ".out.parts" / "images" / "train" / f".unfinished-host-1-{'0' * 8}"
    leftover.write_bytes(b"cut short")
    kept = {path: path.stat().st_mtime_ns for path in leftover.parent.glob("*.jpg")}
    assert len(kept) > num_written
    second = ChipExport(split, tmp_path / "out", spec, data=DataSpec())
    second.start()
    for rank in (1, 0):  # two processes share the rest
        second.write((rank, 2), on_progress=lambda done, total: None)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    second.finish()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_chips_of_other_settings_are_not_continued(
    dataset: Dataset, positives: ChipTable, tmp_path: Path
) -> None:
    split = {"train": ChipSplit(dataset=dataset, tables=(positives,))}
    first = ChipExport(split, tmp_path / "out", ChipFileSpec(to="coco", quality=50), data=DataSpec())
    first.start()
    first.write(on_progress=lambda done, total: None)
    export(split, tmp_path / "out", ChipFileSpec(to="coco", quality=90))
    export(split, tmp_path / "other", ChipFileSpec(to="coco", quality=90))
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): re.sub(rb'"digest": "\w+"', b"", path.read_bytes()) for path in files
    }


@pytest.fixture
def masked(tmp_path: Path) -> Dataset:
    """Return images with polygons and run lengths, and an object without a mask."""
    path = write_masked_dataset(tmp_path / "masked")
    content = json.loads(path.read_text())
    del content["annotations"][0]["segmentation"]
    for entry in content["annotations"][2::2]:  # so that no centre of a pixel lies on an edge
        entry["segmentation"] = [
            [number + 0.137 * (i % 2 + 1) for i, number in enumerate(entry["segmentation"][0])]
        ]
    path.write_text(json.dumps(content))
    return load_dataset(path)


def rasters_of(masks: MaskArrays | None, sides: Sides) -> np.ndarray:
    """Return (n, h, w) masks in a frame; nothing for objects without a mask."""
    assert masks is not None
    count = len(masks)
    return rasterize(masks, np.arange(count), np.tile([0.0, 0.0, *sides], (count, 1)), sides=sides)


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("to", ["coco", "yolo"])
def test_masks_are_those_that_the_chip_shows(
    masked: Dataset, tmp_path: Path, to: FormatName, is_padded: bool
) -> None:
    table = choose_positive_chips(masked, PYRAMID, generator=np.random.default_rng(0))
    spec = ChipFileSpec(
        to=to, encoding="png", ignored="keep", min_visibility=0.0, min_visible_side=0.0, is_padded=is_padded
    )
    split = {"train": ChipSplit(dataset=masked, tables=(table,))}
    warnings = export(split, tmp_path / "out", spec).warnings
    read, manifest = load_dataset(tmp_path / "out"), read_manifest(tmp_path / "out")
    assert len(read) == len(manifest.chips) == len(table)
    by_name = {record.path.name: record for record in read}
    num_masks = num_cut = 0
    for index, entry in enumerate(manifest.chips):
        record = by_name[Path(entry.file_name).name]
        source = next(each for each in masked if each.image_id == entry.image_id)
        chip, sides = table.chip(index), Sides(entry.width, entry.height)
        assert (record.width, record.height) == sides
        boxes = chip.clip(chip.to_chip(source.boxes))
        rows = np.flatnonzero(area(boxes) > 0)
        assert source.masks is not None
        polygons = source.masks.to_polygons()
        moved = polygons.with_points(chip.to_chip(np.tile(polygons.points.astype(np.float64), 2))[:, :2])
        expected, found = rasters_of(moved, sides)[rows], rasters_of(record.masks, sides)
        assert len(found) == len(expected)
        for row, (mask, other) in enumerate(zip(found, expected, strict=True)):
            if to == "yolo" and not other.any():
                x1, y1, x2, y2 = boxes[rows][row].round().astype(int).tolist()
                assert mask[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].all()  # the outline of the box
                continue
            assert (mask == other).all()
            if to == "coco":
                assert record.masks is not None
                assert record.masks.is_encoded[row] == (other.any() and source.masks.is_encoded[rows[row]])
            num_masks += bool(other.any())
            num_cut += bool(other[[0, -1]].any() or other[:, [0, -1]].any())
    assert num_masks > 10
    assert num_cut
    if to == "coco":
        areas = np.concatenate([rasters_of(each.masks, each.sides).sum(axis=(1, 2)) for each in read])
        assert read.masks is not None
        assert read.areas[read.masks.has_mask].tolist() == areas[read.masks.has_mask].tolist()
        assert not warnings
    else:
        assert any(
            "objects without a mask written with the outline of their box" in each for each in warnings
        )


def test_lines_of_yolo_are_all_polygons_of_one_object_each(masked: Dataset, tmp_path: Path) -> None:
    """Ultralytics takes a line of 4 fractions beside polygons for a polygon of 2 points."""
    table = choose_positive_chips(masked, PYRAMID, generator=np.random.default_rng(0))
    folder = tmp_path / "out"
    export(
        {"train": ChipSplit(dataset=masked, tables=(table,))},
        folder,
        ChipFileSpec(to="yolo", ignored="keep"),
    )
    lines = [
        line.split() for path in folder.rglob("labels/**/*.txt") for line in path.read_text().splitlines()
    ]
    assert len(lines) == len(load_dataset(folder).boxes) > 10
    for label, *numbers in lines:
        assert label == "0"
        assert len(numbers) >= 6
        assert len(numbers) % 2 == 0
        assert len(numbers) != 8  # the corners of an oriented box
        assert all(0 <= float(number) <= 1 for number in numbers)
