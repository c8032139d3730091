"""A data set in memory: records, selections, its identity, and its way back to COCO."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.data.datasets import Category, DatasetIdentity
from tests.data.datasets.small import Change, box, category, changed, image, load


def test_a_record_has_the_facts_of_its_image(folder: Path) -> None:
    record = load(folder)[0]
    assert (record.image_id, record.file_name) == (30, "c.png")
    assert (record.width, record.height) == record.sides == (40, 30)
    assert record.path == folder / "images" / "c.png"
    assert record.is_crowd.tolist() == [True]
    assert record.boxes.dtype == np.float64


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_the_data_set_is_refused(folder: Path, index: int) -> None:
    dataset = load(folder)
    with pytest.raises(IndexError):
        dataset[index]


@given(st.lists(st.integers(0, 2), max_size=6))
def test_a_selection_has_the_selected_records(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int]
) -> None:
    dataset = load(tmp_path_factory.mktemp("coco"), has_images=False)
    selected = dataset.select(np.array(indices, dtype=np.int64))
    assert len(selected) == len(indices)
    for record, index in zip(selected, indices, strict=True):
        expected = dataset[index]
        assert (record.image_id, record.path, record.sides) == (
            expected.image_id,
            expected.path,
            expected.sides,
        )
        np.testing.assert_array_equal(record.boxes, expected.boxes)
        np.testing.assert_array_equal(record.labels, expected.labels)
        np.testing.assert_array_equal(record.is_crowd, expected.is_crowd)


def test_equal_contents_have_equal_digests(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    digest = load(folder).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert load(tmp_path_factory.mktemp("other"), has_images=False).digest == digest
    assert load(folder).select(np.arange(3)).digest == digest


def test_the_digest_of_integer_ids_does_not_change(folder: Path) -> None:
    """Existing runs and proposals recognise their data set by it."""
    assert load(folder).digest == "0266bcfe5d07e35f659b4c941c739a08911e28dcd150392e208d5c8f2ec79a02"


def test_ids_of_text_have_digests_of_their_own(folder: Path) -> None:
    digests = {load(folder, changed(image(id=name))).digest for name in ("a", "b", "a" * 100)}
    assert len(digests | {load(folder).digest}) == 4


@pytest.mark.parametrize(
    "change",
    [
        box(bbox=[1, 2, 10, 21]),
        box(iscrowd=1),
        box(category_id=90),
        box(image_id=30),
        image(width=9),
        image(id=21),
        image(file_name="d.png"),
        category(id=91),
        lambda coco: coco["annotations"].reverse(),
    ],
)
def test_other_contents_have_another_digest(folder: Path, change: Change) -> None:
    assert load(folder, changed(change), has_images=False).digest != load(folder).digest


def test_the_identity_has_categories_and_digest(folder: Path) -> None:
    dataset = load(folder)
    identity = DatasetIdentity(categories=dataset.categories, digest=dataset.digest)
    assert dataset.identity == identity
    assert load(folder, changed(category(name="other"))).identity != identity


def test_a_data_set_written_as_coco_loads_the_same(folder: Path) -> None:
    dataset = load(folder)
    again = load(folder, dataset.to_coco())
    assert again.identity == dataset.identity
    np.testing.assert_array_equal(again.areas, dataset.areas)


def test_a_data_set_can_be_sent_to_other_processes(folder: Path) -> None:
    dataset = load(folder)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.digest == dataset.digest
    assert again.categories[0] == Category(category_id=3, name="cat")
