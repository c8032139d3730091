"""Written data sets: read back by us and by another reader, and names that formats cannot hold."""

import json
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as reference

from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.load import load_splits
from sniper.data.datasets.write import FormatName, write_dataset
from sniper.errors import AnnotationError, ConfigError
from sniper.geometry.boxes import Sides
from sniper.geometry.masks import MaskArrays, rasterize
from tests.data.datasets.layouts import boxes_by_file
from tests.data.masked import write_masked_dataset
from tests.data_folder import find_data

FORMATS: tuple[FormatName, ...] = ("coco", "yolo", "voc")


def build(
    folder: Path, boxes: list[list[float]], *, names: list[str] | None = None, crowds: int = 0
) -> Dataset:
    """Write a COCO JSON file with the boxes (xywh) in turn on its images, the first of them crowds, and load it."""
    names = names or ["a.png", "b.png"]
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": name, "width": 97, "height": 61} for i, name in enumerate(names)],
        "categories": [{"id": 5, "name": "big cat: 'no'"}, {"id": 2, "name": "<dög & co>"}],
        "annotations": [
            {
                "id": i,
                "image_id": i % len(names),
                "category_id": (5, 2)[i % 3 == 0],
                "bbox": box,
                "iscrowd": int(i < crowds),
            }
            for i, box in enumerate(boxes)
        ],
    }
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (97, 61)).save(folder / "images" / name)
    (folder / "x.json").write_text(json.dumps(content))
    return load_dataset(folder / "x.json")


def assert_same(dataset: Dataset, other: Dataset, *, tolerance: float = 1e-3) -> None:
    """Compare names, categories, crowds and boxes, image by image, by the stem of the file name."""

    def boxes_by_kind(records: Dataset) -> dict[str, dict[tuple[str, bool], list[list[float]]]]:
        stems: dict[str, dict[tuple[str, bool], list[list[float]]]] = {}
        for record in records:
            kinds = stems.setdefault(Path(record.file_name).stem, {})
            for box, label, is_crowd in zip(
                record.boxes.tolist(), record.labels.tolist(), record.is_crowd.tolist(), strict=True
            ):
                kinds.setdefault((records.categories[label].name, is_crowd), []).append(box)
        return stems

    ours, theirs = boxes_by_kind(dataset), boxes_by_kind(other)
    assert ours.keys() == theirs.keys()
    for stem, kinds in ours.items():
        assert kinds.keys() == theirs[stem].keys()
        for kind, boxes in kinds.items():
            others = theirs[stem][kind]
            assert len(boxes) == len(others)
            differences = np.abs(np.array(boxes)[:, None] - np.array(others)).max(axis=2)  # (n, n)
            assert differences.min(axis=1).max() <= tolerance
            assert differences.min(axis=0).max() <= tolerance


@pytest.mark.parametrize("to", FORMATS)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    boxes=st.lists(
        st.tuples(st.integers(0, 90), st.integers(0, 55), st.floats(2, 7), st.floats(2, 6)).map(list),
        max_size=9,
    )
)
def test_written_boxes_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, to: FormatName, boxes: list[list[float]]
) -> None:
    folder = tmp_path_factory.mktemp(to)
    dataset = build(folder, boxes)
    assert write_dataset({"": dataset}, folder / "out", to=to) == []
    read = load_dataset(folder / "out")
    assert_same(dataset, read, tolerance=1e-5)
    assert read.widths.tolist() == [97, 97]
    if to == "coco":
        assert read.categories == dataset.categories
        assert read.image_ids.tolist() == [0, 1]


def test_crowds_are_difficult_in_voc_and_left_out_of_yolo(tmp_path: Path) -> None:
    dataset = build(tmp_path, [[1, 2, 30, 20], [5, 5, 10, 10], [50, 9, 10, 11]], crowds=1)
    assert write_dataset({"": dataset}, tmp_path / "voc", to="voc") == []
    assert_same(dataset, load_dataset(tmp_path / "voc"))
    (warning,) = write_dataset({"": dataset}, tmp_path / "yolo", to="yolo")
    assert warning == "crowds and regions to ignore left out, as YOLO cannot express them: 1 (a.png)"
    assert boxes_by_file(load_dataset(tmp_path / "yolo"))["images/a.png"] == [
        ("big cat: 'no'", [50.0, 9.0, 60.0, 20.0], False)
    ]


@pytest.mark.parametrize("to", FORMATS)
def test_splits_are_written_under_their_names(tmp_path: Path, to: FormatName) -> None:
    splits = {"train": build(tmp_path / "a", [[1, 2, 3, 4]]), "val": build(tmp_path / "b", [[5, 6, 7, 8]])}
    write_dataset(splits, tmp_path / "out", to=to)
    read = load_splits(tmp_path / "out")
    assert list(read) == ["train", "val"]
    for split, dataset in read.items():
        np.testing.assert_allclose(dataset.boxes, splits[split].boxes, atol=1e-4)


@pytest.mark.parametrize("to", FORMATS)
def test_images_that_would_share_a_label_file_are_renamed(tmp_path: Path, to: FormatName) -> None:
    dataset = build(tmp_path, [[1, 2, 3, 4], [5, 6, 7, 8]], names=["a.png", "a.bmp"])
    (warning,) = write_dataset({"": dataset}, tmp_path / "out", to=to)
    assert warning == "images renamed: 1 (a.bmp is a_2.bmp)"
    np.testing.assert_allclose(
        np.sort(load_dataset(tmp_path / "out").boxes, axis=0), dataset.boxes, atol=1e-4
    )


@pytest.mark.parametrize("to", FORMATS)
def test_names_with_folders_stay_apart(tmp_path: Path, to: FormatName) -> None:
    dataset = build(tmp_path, [[1, 2, 3, 4], [5, 6, 7, 8]], names=["x/a.png", "y/a.png"])
    write_dataset({"": dataset}, tmp_path / "out", to=to)
    np.testing.assert_allclose(load_dataset(tmp_path / "out").boxes, dataset.boxes, atol=1e-4)


@pytest.mark.parametrize("images", ["link", "none"])
def test_images_are_linked_or_left(tmp_path: Path, images: Any) -> None:
    dataset = build(tmp_path, [[1, 2, 3, 4]])
    write_dataset({"": dataset}, tmp_path / "out", to="yolo", images=images)
    written = tmp_path / "out" / "images" / "a.png"
    assert written.exists() == (images == "link")
    assert images == "none" or written.samefile(dataset[0].path)


def test_a_folder_with_files_is_refused_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    dataset = build(tmp_path, [[1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="is not empty, expected a new folder"):
        write_dataset({"": dataset}, tmp_path / "images", to="coco")
    (tmp_path / "images" / "b.png").unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"b\.png: cannot be written to .* \(No such file or directory\)"):
        write_dataset({"": dataset}, tmp_path / "out", to="yolo")
    assert sorted(tmp_path.iterdir()) == before


def test_names_that_xml_cannot_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    build(tmp_path, [])
    path.write_text(path.read_text().replace("big cat", "\\u001b[31m"))
    with pytest.raises(AnnotationError, match=r"1 names cannot be written in XML"):
        write_dataset({"": load_dataset(path)}, tmp_path / "out", to="voc")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hit_uav", "coco_person", "deeppcb"])
@pytest.mark.parametrize("form", ["yolo", "voc", "cvat", "dota", "oid"])
def test_real_data_sets_converted_by_another_tool_are_read(tmp_path: Path, name: str, form: str) -> None:
    source = find_data(f"data/{name}/train.json")
    truth = load_dataset(source, has_images=False)
    truth = truth.select(np.flatnonzero([not record.is_crowd.any() for record in truth]))
    content = truth.to_coco()
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["obb"] = [x + width / 2, y + height / 2, width, height, 0.0]
    converted = hotcoco.COCO(content)
    out = tmp_path / "out"
    targets = {"yolo": out / "labels", "voc": out, "cvat": out / "annotations.xml", "dota": out / "labelTxt"}
    out.mkdir()
    getattr(converted, f"to_{form}")(str(targets.get(form, out / "train-annotations-bbox.csv")))
    (out / "images").symlink_to(source.parent / "images")
    if form == "yolo":
        (out / "train.txt").write_text("".join(f"./images/{file_name}\n" for file_name in truth.file_names))
        names = (out / "labels" / "data.yaml").read_text()
        (out / "data.yaml").write_text(f"train: train.txt\n{names}")
    read = load_dataset(out, has_images=False)
    if form == "oid":  # which has no images without boxes
        truth = truth.select(np.flatnonzero([len(record.boxes) > 0 for record in truth]))
    assert_same(truth, read)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hit_uav", "coco_person", "deeppcb"])
@pytest.mark.parametrize("to", FORMATS)
def test_real_data_sets_written_by_us_are_read_by_us_and_by_another_tool(
    tmp_path: Path, name: str, to: FormatName
) -> None:
    truth = load_dataset(find_data(f"data/{name}/train.json"), has_images=False)
    truth = truth.select(np.flatnonzero([not record.is_crowd.any() for record in truth]))
    out = tmp_path / "out"
    write_dataset({"": truth}, out, to=to)
    assert_same(truth, load_dataset(out))
    if to == "coco":
        other = hotcoco.COCO(str(out / "annotations" / "instances.json"))
    elif to == "voc":
        other = hotcoco.COCO.from_voc(str(out))
    else:
        (out / "data.yaml").rename(out / "labels" / "data.yaml")
        other = hotcoco.COCO.from_yolo(str(out / "labels"), images_dir=str(out / "images"))
    images = {image["id"]: Path(image["file_name"]).stem for image in other.dataset["images"]}
    categories = {category["id"]: category["name"] for category in other.dataset["categories"]}
    found = sorted(
        (images[entry["image_id"]], categories[entry["category_id"]], *np.round(entry["bbox"], 2).tolist())
        for entry in other.dataset["annotations"]
    )
    expected = sorted(
        (
            Path(record.file_name).stem,
            truth.categories[label].name,
            *np.round([box[0], box[1], box[2] - box[0], box[3] - box[1]], 2).tolist(),
        )
        for record in truth
        for box, label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True)
    )
    assert found == expected


@pytest.mark.parametrize("to", FORMATS)
def test_masks_are_read_back_as_they_were(tmp_path: Path, to: FormatName) -> None:
    dataset = load_dataset(write_masked_dataset(tmp_path / "source"))
    warnings = write_dataset({"train": dataset}, tmp_path / "out", to=to)
    read = load_dataset(tmp_path / "out")
    num_equal = 0
    for record, other in zip(dataset, sorted(read, key=lambda each: each.file_name), strict=True):
        region = np.array([[0.0, 0, record.width, record.height]] * 4)
        assert record.masks is not None
        assert other.masks is not None
        masks, others = (
            rasterize(each, np.arange(4), region, sides=record.sides) for each in (record.masks, other.masks)
        )
        assert (masks != others).sum() <= 4  # centres on an edge
        num_equal += int((masks == others).all(axis=(1, 2)).sum())
    assert num_equal >= 5
    assert not warnings


def test_the_smaller_of_two_masks_is_on_top_in_voc(tmp_path: Path) -> None:
    coco = build(tmp_path, [[10, 10, 4, 4], [0, 0, 60, 40]], names=["a.png"]).to_coco()
    for entry in coco["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    (tmp_path / "x.json").write_text(json.dumps(coco))
    warnings = write_dataset({"": load_dataset(tmp_path / "x.json")}, tmp_path / "out", to="voc")
    shared = "masks without the pixels that they share with others, as VOC has one object a pixel"
    assert warnings == [f"{shared}: 1 (a.png)"]
    read = load_dataset(tmp_path / "out")
    assert read.masks is not None
    assert sorted(read.masks.measure().areas.tolist()) == [16, 60 * 40 - 16]


def test_parts_and_holes_are_one_line_of_yolo(tmp_path: Path) -> None:
    dataset = build(tmp_path, [[10, 10, 40, 40], [0, 0, 97, 61]])
    parts = [[10, 10, 20, 10, 20, 20], [40, 40, 50, 40, 50, 50]]
    ring = np.zeros((61, 97), dtype=np.uint8)
    ring[5:50, 5:80], ring[20:30, 20:40], ring[23:25, 23:25] = 1, 0, 1
    encoded = reference.encode(np.asfortranarray(ring))
    coco = dataset.to_coco()
    coco["annotations"][0]["segmentation"] = parts
    coco["annotations"][1]["segmentation"] = {"size": [61, 97], "counts": encoded["counts"].decode()}
    (tmp_path / "x.json").write_text(json.dumps(coco))
    dataset = load_dataset(tmp_path / "x.json")
    write_dataset({"": dataset}, tmp_path / "out", to="yolo")
    read = load_dataset(tmp_path / "out")
    assert read.masks is not None
    assert np.diff(read.masks.offsets).tolist() == [1, 1]
    region, sides = np.array([[0.0, 0, 97, 61]] * 2), Sides(97, 61)
    found = rasterize(read.masks, np.arange(2), region, sides=sides)
    of_parts = MaskArrays.from_rings([[np.reshape(part, (-1, 2)) for part in parts]])
    assert (found[0] == rasterize(of_parts, np.array([0]), region[:1], sides=sides)[0]).all()
    assert (found[1] == ring).all()


def test_an_image_of_more_objects_than_voc_has_numbers_is_without_masks(tmp_path: Path) -> None:
    dataset = build(tmp_path, [[i % 90, i // 90, 3, 3] for i in range(300)], names=["a.png"])
    coco = dataset.to_coco()
    for entry in coco["annotations"]:
        x, y, _, _ = entry["bbox"]
        entry["segmentation"] = [[x, y, x + 3, y, x + 3, y + 3]]
    (tmp_path / "x.json").write_text(json.dumps(coco))
    warnings = write_dataset({"": load_dataset(tmp_path / "x.json")}, tmp_path / "out", to="voc")
    assert warnings == ["images without their masks, as VOC numbers at most 254 objects: 1 (a.png)"]
    assert not (tmp_path / "out" / "SegmentationObject").exists()


def test_masks_of_voc_are_in_its_colours(tmp_path: Path) -> None:
    write_dataset({"": load_dataset(write_masked_dataset(tmp_path / "source"))}, tmp_path / "out", to="voc")
    with Image.open(tmp_path / "out" / "SegmentationObject" / "1.png") as image:
        assert image.mode == "P"
        palette = np.reshape(image.getpalette() or [], (-1, 3)).tolist()
    assert [palette[number] for number in (0, 1, 2, 3, 4, 20)] == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [0, 64, 128]
    ]  # fmt: skip
    assert "<segmented>1</segmented>" in (tmp_path / "out" / "Annotations" / "1.xml").read_text()
