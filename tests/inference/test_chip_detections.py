"""Detections on chips come back to their images: exact boxes return exactly, whatever cut them."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sniper.chips import ChipTable, LevelSpec, PyramidSpec
from sniper.config.experiment import PredictSpec, widened
from sniper.data.chip_labels import ChipFileSpec
from sniper.data.chip_manifest import ChipManifest, read_manifest
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.write import FormatName
from sniper.data.epoch import choose_positive_chips, to_image_boxes
from sniper.data.export import ChipExport, ChipSplit
from sniper.data.spec import DataSpec
from sniper.errors import DetectionsError
from sniper.evaluation.results import DetectionTable
from sniper.geometry.boxes import from_xywh, iou, to_xywh
from sniper.geometry.masks import rasterize
from sniper.inference.chip_detections import load_chip_detections, merge_chips, to_results
from sniper.inference.windows import Tiling, list_windows
from tests.data.masked import write_masked_dataset
from tests.data.tiny import write_dataset

PYRAMID = PyramidSpec(
    chip_size=64, stride=16, levels=(LevelSpec(factor=1.5, below=40), LevelSpec(long_side=64, at_least=16))
)
LEVELS = widened(PYRAMID.levels)
HARD = PredictSpec(levels=LEVELS, merge="hard", merge_iou=0.8)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    sides = ((160, 120), (96, 200), (333, 187), (200, 200), (50, 30))
    path = write_dataset(tmp_path / "source", sides=sides, boxes_per_image=6)
    content = json.loads(path.read_text())
    kept: list[dict[str, Any]] = []
    for entry in content["annotations"]:  # objects that overlap so much are merged as duplicates
        others = [other["bbox"] for other in kept if other["image_id"] == entry["image_id"]]
        pair = (np.array([entry["bbox"]], dtype=float), np.array(others, dtype=float).reshape(-1, 4))
        if iou(*map(from_xywh, pair)).max(initial=0) < 0.3:
            kept.append(entry)
    path.write_text(json.dumps({**content, "annotations": kept}))
    return load_dataset(path)


def positives_of(dataset: Dataset) -> ChipTable:
    return choose_positive_chips(dataset, PYRAMID, generator=np.random.default_rng(0))


def windows_of(dataset: Dataset) -> ChipTable:
    return list_windows(LEVELS, to_image_boxes(dataset), limit=64)


def write(
    dataset: Dataset, table: ChipTable, folder: Path, *, window: int | None = None, to: FormatName = "coco"
) -> ChipManifest:
    export = ChipExport(
        {"test": ChipSplit(dataset=dataset, tables=(table,), window=window)},
        folder,
        # What a perfect detector sees of an object, however little that is.
        ChipFileSpec(
            to=to, ignored="crowd" if to == "coco" else "keep", min_visibility=0, min_visible_side=0
        ),
        data=DataSpec(),
    )
    export.start()
    export.write(on_progress=lambda done, total: None)
    export.finish()
    return read_manifest(folder)


def truth_as_results(folder: Path, *, name: str = "id") -> list[dict[str, Any]]:
    """Return the annotations of chips as exact detections, named by the id or the file name of the chip."""
    read = load_dataset(folder)
    return [
        {
            "image_id": {"id": record.image_id, "name": record.path.name, "stem": record.path.stem}[name],
            "category_id": read.categories[label].category_id,
            "bbox": box,
            "score": 0.9,
        }
        for record in read
        for box, label in zip(to_xywh(record.boxes).tolist(), record.labels.tolist(), strict=True)
    ]


def merged(
    folder: Path, manifest: ChipManifest, results: object, *, spec: PredictSpec = HARD, **options: Any
) -> Mapping[int | str, list[dict[str, Any]]]:
    path = folder.parent / "results.json"
    path.write_text(json.dumps(results))
    found, categories = load_chip_detections(path, manifest)
    return {
        image.image_id: to_results(image, categories)
        for image in merge_chips(found, manifest, spec, **options)
    }


def check_returned(dataset: Dataset, results: Mapping[int | str, list[dict[str, Any]]]) -> None:
    """Check that every object came back within 0.001 pixels, once, and nothing else but parts of objects."""
    for record in dataset:
        entries = results[record.image_id]
        boxes = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
        labels = [entry["category_id"] - 10 for entry in entries]
        expected = to_xywh(record.boxes)
        distances = np.abs(expected[:, None] - boxes[None]).max(axis=2, initial=0)
        distances[record.labels[:, None] != np.array(labels)[None]] = math.inf
        assert ((distances < 1e-3).sum(axis=1) == 1).all()


@pytest.mark.parametrize("name", ["id", "name", "stem"])
def test_exact_boxes_on_chips_come_back_exactly(dataset: Dataset, tmp_path: Path, name: str) -> None:
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips")
    check_returned(
        dataset, merged(tmp_path / "chips", manifest, truth_as_results(tmp_path / "chips", name=name))
    )


def test_exact_boxes_on_windows_of_a_search_come_back_exactly(dataset: Dataset, tmp_path: Path) -> None:
    manifest = write(dataset, windows_of(dataset), tmp_path / "chips", window=64)
    check_returned(dataset, merged(tmp_path / "chips", manifest, truth_as_results(tmp_path / "chips")))


def test_text_files_of_yolo_come_back_as_results_do(dataset: Dataset, tmp_path: Path) -> None:
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips", to="yolo")
    folder = tmp_path / "predicted"
    folder.mkdir()
    for path in (tmp_path / "chips" / "labels").rglob("*.txt"):
        lines = path.read_text().splitlines()
        if lines:
            (folder / path.name).write_text("".join(f"{line} 0.9\n" for line in lines))
    found, categories = load_chip_detections(folder, manifest)
    images = merge_chips(found, manifest, HARD)
    check_returned(dataset, {image.image_id: to_results(image, categories) for image in images})


def test_windows_are_those_that_a_search_sees(dataset: Dataset) -> None:
    table = windows_of(dataset)
    for image, record in enumerate(dataset):
        expected = [
            (level.index, *window.corners[:2])
            for level in (
                spec.at(width=record.width, height=record.height, index=index)
                for index, spec in enumerate(LEVELS)
            )
            for window in Tiling.of(level, limit=64).windows()
        ]
        rows = range(*table.offsets[image : image + 2].tolist())
        assert [(int(table.level[i]), int(table.x[i]), int(table.y[i])) for i in rows] == expected


def test_levels_report_objects_in_their_ranges_unless_ranges_are_ignored(
    dataset: Dataset, tmp_path: Path
) -> None:
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips")
    entry = next(entry for entry in manifest.chips if entry.level == 0)
    large = {
        "image_id": entry.chip_id, "category_id": 10, "bbox": [1.0, 1.0, 62.0, 62.0], "score": 0.5,
    }  # fmt: skip
    kept = merged(tmp_path / "chips", manifest, [large])
    assert not any(kept.values())
    ignored = merged(tmp_path / "chips", manifest, [large], in_valid_range=False)
    (found,) = ignored[entry.image_id]
    assert found["bbox"][2] == pytest.approx(62 / 1.5, abs=1e-3)
    assert found["category_name"] == "dark"
    assert found["file_name"] == entry.image


def test_detections_in_the_padding_are_dropped_and_others_clipped(dataset: Dataset, tmp_path: Path) -> None:
    manifest = write(dataset, windows_of(dataset), tmp_path / "chips", window=64)
    entry = next(entry for entry in manifest.chips if entry.image_id == 5 and entry.level == 1)
    assert entry.level_height < 60  # of 64 that the file has
    common = {"image_id": entry.chip_id, "category_id": 11, "score": 0.5}
    boxes = [[0, entry.level_height + 2, 64, 10], [4, 4, 50, 60]]
    results = merged(tmp_path / "chips", manifest, [{**common, "bbox": box} for box in boxes])
    (found,) = results[5]
    assert found["bbox"][1] + found["bbox"][3] == pytest.approx(30, abs=1e-3)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": 9999}, "1 values of image_id are no chips of .*expected ids such as 1"),
        ({"image_id": "no"}, "'no'"),
        ({"category_id": 0}, r"category_id are no categories of the chips \(0\); expected 10 \(dark\), 11"),
        ({"bbox": [1, 2]}, "bbox must be four finite numbers"),
        (
            {"bbox": [70, 0, 9, 9]},
            r"1 box lies outside of the chip; entry 0 on .*which has 64x64 pixels: bbox is \[70.0, 0.0, 9.0, 9.0\]",
        ),
        ({"bbox": [0, -13, 9, 9]}, "1 box lies outside of the chip"),
        ({"bbox": [-40, 0, 130, 9]}, "1 box lies outside of the chip"),
    ],
)
def test_results_that_belong_to_no_chip_are_refused(
    dataset: Dataset, tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips")
    whole = {"image_id": 1, "category_id": 10, "bbox": [0, 0, 5, 5], "score": 0.5, **entry}
    with pytest.raises(DetectionsError, match=message):
        merged(tmp_path / "chips", manifest, [whole])


@pytest.mark.parametrize("box", [[66, 0, 9, 9], [-40, 0, 120, 64], [0, 0, 0, 0]])
def test_boxes_may_reach_beyond_their_chip(dataset: Dataset, tmp_path: Path, box: list[float]) -> None:
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips")
    merged(tmp_path / "chips", manifest, [{"image_id": 1, "category_id": 10, "bbox": box, "score": 0.5}])


@pytest.mark.parametrize(("ids", "first"), [("from-0", 0), ("from-1", 1)])
def test_classes_may_be_counted_instead_of_named_by_ids(
    dataset: Dataset, tmp_path: Path, ids: Any, first: int
) -> None:
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips")
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 1, "category_id": first + 1, "bbox": [0, 0, 9, 9], "score": 1}]))
    found, categories = load_chip_detections(path, manifest, category_ids=ids)
    assert [categories[label].name for label in found.detections.labels.tolist()] == ["bright"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1 0.1", "line 1: has no confidence; expected class, x, y, width, height, confidence"),
        ("0 0.5 0.5 0.1 0.1 0.9 7", "has 7 values"),
        ("2 0.5 0.5 0.1 0.1 0.9", "class 2, expected 0 to 1"),
        ("0 320 240 64 64 0.9", "expected fractions of the sides"),
        ("0 0.5 0.5 -0.1 0.1 0.9", "expected fractions of the sides"),
        ("0 0.5 0.5 nan 0.1 0.9", "expected fractions of the sides"),
        ("a b c d e f", "got 'a b c d e f'"),
    ],
)
def test_lines_that_are_no_detections_are_refused(
    dataset: Dataset, tmp_path: Path, line: str, message: str
) -> None:
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips", to="yolo")
    folder = tmp_path / "predicted"
    folder.mkdir()
    (folder / f"{Path(manifest.chips[0].file_name).stem}.txt").write_text(line)
    with pytest.raises(DetectionsError, match=message):
        load_chip_detections(folder, manifest)


def test_folders_of_other_files_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips")
    with pytest.raises(DetectionsError, match=r"has no text files"):
        load_chip_detections(tmp_path / "source", manifest)
    (tmp_path / "source" / "x.txt").write_text("")
    with pytest.raises(DetectionsError, match=r"1 files are of no chip"):
        load_chip_detections(tmp_path / "source", manifest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no manifest of chips"),
        ('{"images": []}', "is no manifest of chips"),
        ('{"manifest": "sniper chips", "version": 7}', "it has version 7, this program reads 1"),
        ('{"manifest": "sniper chips", "version": 1, "digest": ""}', "has no 'categories'"),
        (
            '{"manifest": "sniper chips", "version": 1, "digest": "", "categories": [], "counts": {}}\n{"x": 1}',
            "is damaged",
        ),
    ],
)
def test_files_that_are_no_manifest_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "chips.jsonl").write_text(content)
    with pytest.raises(DetectionsError, match=message):
        read_manifest(tmp_path)


def test_images_of_two_splits_with_equal_ids_need_the_name_of_one(dataset: Dataset, tmp_path: Path) -> None:
    table = positives_of(dataset)
    splits = {name: ChipSplit(dataset=dataset, tables=(table,)) for name in ("train", "val")}
    export = ChipExport(splits, tmp_path / "chips", ChipFileSpec(to="coco"), data=DataSpec())
    export.start()
    export.write(on_progress=lambda done, total: None)
    export.finish()
    manifest = read_manifest(tmp_path / "chips")
    with pytest.raises(DetectionsError, match="--split train or val"):
        manifest.of_split(None)
    assert len(manifest.of_split("val").chips) == len(table)
    with pytest.raises(DetectionsError, match="has no chips of split test, expected one of train, val"):
        manifest.of_split("test")


def test_results_keep_their_categories_where_those_of_the_chips_are_not_known(
    dataset: Dataset, tmp_path: Path
) -> None:
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips")
    unnamed = replace(manifest, head=replace(manifest.head, categories=()))
    path = tmp_path / "results.json"
    entry = {"image_id": 1, "bbox": [0, 0, 9, 9], "score": 1}
    path.write_text(
        json.dumps([{**entry, "category_id": 7}, {**entry, "category_id": 3, "category_name": "car"}])
    )
    _, categories = load_chip_detections(path, unnamed)
    assert [(each.category_id, each.name) for each in categories] == [(3, "car"), (7, "7")]


def test_merged_objects_are_no_duplicates(dataset: Dataset, tmp_path: Path) -> None:
    table = windows_of(dataset)
    manifest = write(dataset, table, tmp_path / "chips", window=64)
    gaussian = replace(HARD, merge="gaussian", score_threshold=0.5)
    results = merged(tmp_path / "chips", manifest, truth_as_results(tmp_path / "chips"), spec=gaussian)
    for record in dataset:
        boxes = np.array([entry["bbox"] for entry in results[record.image_id]]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert (iou(record.boxes, boxes).max(axis=1) > 0.99).mean() > 0.7


def results_with_masks(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": entry["bbox"],
            "score": 0.9,
            **({"segmentation": entry["segmentation"]} if "segmentation" in entry else {}),
        }
        for entry in load_dataset(folder).to_coco()["annotations"]
    ]


def test_masks_on_chips_come_back_to_their_images(tmp_path: Path) -> None:
    dataset = load_dataset(write_masked_dataset(tmp_path / "source"))
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips")
    results = merged(tmp_path / "chips", manifest, results_with_masks(tmp_path / "chips"))
    num_found = 0
    for record in dataset:
        entries = results[record.image_id]
        boxes = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
        table = DetectionTable.from_entries(entries)
        assert table.masks is not None
        for row, box in enumerate(to_xywh(record.boxes)):
            match = int(np.abs(boxes - box).max(axis=1).argmin())
            assert record.masks is not None
            rasters = [
                rasterize(masks, np.array([index]), np.array([[0.0, 0, *record.sides]]), sides=record.sides)[
                    0
                ]
                for masks, index in ((record.masks, row), (table.masks, match))
            ]
            overlap = (rasters[0] & rasters[1]).sum() / (rasters[0] | rasters[1]).sum()
            if record.masks.is_encoded[row]:
                assert table.masks.sides[match].tolist() == [*record.sides]
                assert overlap > 0.85  # run lengths have the pixels of the chip
            else:
                assert overlap > 0.98  # centres on an edge
            num_found += 1
    assert num_found == 8


def test_a_detection_without_a_mask_stays_without(tmp_path: Path) -> None:
    dataset = load_dataset(write_masked_dataset(tmp_path / "source"))
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips")
    given = results_with_masks(tmp_path / "chips")
    for entry in given[::2]:
        entry.pop("segmentation", None)
    entries = [
        entry for of_image in merged(tmp_path / "chips", manifest, given).values() for entry in of_image
    ]
    assert {"segmentation" in entry for entry in entries} == {True, False}


def test_run_lengths_that_do_not_fill_the_chip_are_refused(tmp_path: Path) -> None:
    dataset = load_dataset(write_masked_dataset(tmp_path / "source"))
    manifest = write(dataset, positives_of(dataset), tmp_path / "chips")
    given = results_with_masks(tmp_path / "chips")
    given[3]["segmentation"] = {"size": [64, 63], "counts": [64 * 63]}
    with pytest.raises(
        DetectionsError, match=r"1 mask .* entry 3 on images/.*: size is \[64, 63\], expected \[64, 64\]"
    ):
        merged(tmp_path / "chips", manifest, given)
