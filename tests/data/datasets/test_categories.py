"""Classes of a detector and categories of a data set are matched by name."""

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.data.datasets import Category
from sniper.data.datasets.categories import match_categories
from sniper.errors import AnnotationError
from sniper.geometry import Detections


def categories(**ids: int) -> tuple[Category, ...]:
    return tuple(Category(category_id=number, name=name) for name, number in ids.items())


def test_equal_categories_match_without_a_warning() -> None:
    match = match_categories(categories(car=1, bus=2), categories(car=1, bus=2))
    assert (match.labels.tolist(), match.warnings, match.added) == ([0, 1], (), ())


@given(st.permutations(["car", "bus", "van", "ship"]), st.permutations(["car", "bus", "van", "ship"]))
def test_order_and_ids_do_not_matter(first: list[str], second: list[str]) -> None:
    others = tuple(Category(category_id=number, name=name) for number, name in enumerate(second))
    match = match_categories([Category(category_id=9, name=name) for name in first], others)
    assert [match.categories[label].name for label in match.labels] == first
    assert match.categories == others


def test_renumbered_ids_are_reported() -> None:
    match = match_categories(
        categories(car=1, bus=2), categories(bus=1, car=2), classes_of="runs/a", categories_of="b.json"
    )
    assert match.labels.tolist() == [1, 0]
    assert match.warnings == (
        "b.json has other category ids than runs/a, matched by name: 'car' is 2, not 1; 'bus' is 1, not 2",
    )


@pytest.mark.parametrize(
    "spelling", ["Traffic Light", "traffic_light", "traffic-light ", "\uff54raffic  light"]
)
def test_other_spellings_match_with_a_warning(spelling: str) -> None:
    match = match_categories(
        [Category(category_id=1, name="traffic light")], [Category(category_id=1, name=spelling)]
    )
    assert match.is_known.all()
    assert match.warnings == (
        f"the data set spells category names otherwise than the detector: 'traffic light' is {spelling!r}",
    )


def test_an_equal_spelling_is_preferred_and_an_ambiguous_one_no_match() -> None:
    match = match_categories(categories(Car=1, bus=2), categories(car=1, Car=2, bus=3))
    assert match.labels.tolist() == [1, 2]
    match = match_categories(categories(CAR=1, bus=2), categories(car=1, Car=2, bus=3))
    assert [category.name for category in match.added] == ["CAR"]


def test_classes_on_one_side_are_reported_and_keep_distinct_ids() -> None:
    match = match_categories(categories(car=1, ring=2, disc=3), categories(bus=7, car=3))
    assert match.labels.tolist() == [1, 2, 3]
    assert match.is_known.tolist() == [True, False, False]
    assert [category.category_id for category in match.categories] == [7, 3, 8, 9]
    unknown, lacking = match.warnings[1:]
    assert unknown == (
        "the detector does not know 1 category of the data set, whose objects cannot be detected: 'bus'"
    )
    assert lacking == "the data set lacks 2 categories of the detector: 'ring', 'disc'"


def test_a_data_set_without_categories_has_those_of_the_detector() -> None:
    match = match_categories(categories(car=1, bus=2), ())
    assert (match.categories, match.labels.tolist()) == (categories(car=1, bus=2), [0, 1])


def test_no_common_name_is_refused_with_both_lists() -> None:
    message = "runs/a and b.json have no category name in common: 'car', 'bus' and 'ship'"
    with pytest.raises(AnnotationError, match=f"^{re.escape(message)}$"):
        match_categories(
            categories(car=1, bus=2), categories(ship=1), classes_of="runs/a", categories_of="b.json"
        )


def test_repeated_names_are_refused_unless_both_sides_are_equal() -> None:
    twice = (Category(category_id=1, name="car"), Category(category_id=2, name="car"))
    assert match_categories(twice, twice).labels.tolist() == [0, 1]
    with pytest.raises(AnnotationError, match=r"^the data set: .* more than once: 'car' \(2 times\)$"):
        match_categories(categories(car=1), twice)
    with pytest.raises(AnnotationError, match=r"^the detector: "):
        match_categories(twice, categories(car=1))


def test_ids_of_text_match_too() -> None:
    match = match_categories(categories(car=1, bus=2), [Category(category_id="/m/0k4j", name="car")])
    assert [category.category_id for category in match.categories] == ["/m/0k4j", 3]


def test_detections_are_relabelled() -> None:
    match = match_categories(categories(car=1, bus=2), categories(bus=1, car=2))
    detections = Detections(boxes=np.zeros((3, 4)), scores=np.ones(3), labels=np.array([0, 1, 0]))
    relabelled = match.relabel(detections)
    assert relabelled.labels.tolist() == [1, 0, 1]
    assert relabelled.names == ("car", "bus", "car")


def test_many_categories_are_matched_in_linear_time() -> None:
    count = 50_000
    classes = [Category(category_id=number, name=f"class {number}") for number in range(count)]
    others = [Category(category_id=number, name=f"CLASS {number + count // 2}") for number in range(count)]
    started = time.process_time()
    match = match_categories(classes, others)
    assert time.process_time() - started < 10  # seconds; with one search for each name, minutes
    assert match.is_known.sum() == count // 2
