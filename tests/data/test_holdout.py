"""Held-out images: disjoint, complete, and the same wherever the seed and the file names are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.data.datasets import Dataset, load_dataset
from sniper.data.holdout import draw_images, hold_out
from sniper.errors import AnnotationError
from tests.data.tiny import write_dataset


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_dataset(tmp_path_factory.mktemp("images"), sides=((40, 40),) * 25))


def names_of(dataset: Dataset) -> list[str]:
    return list(map(str, dataset.file_names.tolist()))


@settings(deadline=None, max_examples=50)
@given(share=st.floats(0.001, 0.999), seed=st.integers(0, 2**31))
def test_every_image_is_either_trained_on_or_held_out(images: Dataset, share: float, seed: int) -> None:
    trained, held_out = hold_out(images, share=share, seed=seed)
    assert sorted(names_of(trained) + names_of(held_out)) == sorted(names_of(images))
    assert len(held_out) == min(max(round(share * 25), 1), 24)
    assert len(trained.boxes) + len(held_out.boxes) == len(images.boxes)


def test_neither_the_order_nor_the_ids_of_images_matter(images: Dataset) -> None:
    expected = set(names_of(hold_out(images, share=0.2, seed=3)[1]))
    shuffled = images.select(np.random.default_rng(0).permutation(len(images)))
    renumbered = replace(shuffled, image_ids=np.arange(100, 100 + len(images)))
    assert set(names_of(hold_out(renumbered, share=0.2, seed=3)[1])) == expected


def test_seeds_hold_out_different_images(images: Dataset) -> None:
    drawn = {tuple(names_of(hold_out(images, share=0.2, seed=seed)[1])) for seed in range(5)}
    assert len(drawn) == 5


def test_entries_of_one_file_stay_together(images: Dataset) -> None:
    doubled = images.select(np.repeat(np.arange(len(images)), 2))
    trained, held_out = hold_out(doubled, share=0.3, seed=0)
    assert not set(names_of(trained)) & set(names_of(held_out))


@pytest.mark.parametrize("number", [0, 1])
def test_a_single_image_cannot_be_held_out(images: Dataset, number: int) -> None:
    with pytest.raises(AnnotationError, match=r"none can be held out; set data\.holdout to 0"):
        hold_out(images.select(np.arange(number)), share=0.1, seed=0)


def test_a_share_is_refused_beside_other_test_images(tmp_path: Path) -> None:
    from sniper.data.spec import DataSpec, SourceSpec

    with pytest.raises(ValueError, match="holdout must be 0 with test"):
        DataSpec(holdout=0.1, test=SourceSpec(annotations=str(tmp_path)))


def test_a_subset_depends_on_the_seed_and_the_file_names_alone(images: Dataset) -> None:
    drawn = draw_images(images, num_images=7, seed=3)
    assert len(set(names_of(drawn))) == 7
    assert [name for name in names_of(images) if name in names_of(drawn)] == names_of(drawn)
    shuffled = images.select(np.random.default_rng(0).permutation(len(images)))
    assert set(names_of(draw_images(shuffled, num_images=7, seed=3))) == set(names_of(drawn))
    assert set(names_of(draw_images(images, num_images=7, seed=4))) != set(names_of(drawn))
    assert set(names_of(drawn)) < set(names_of(draw_images(images, num_images=8, seed=3)))
    assert names_of(draw_images(images, num_images=99, seed=3)) == names_of(images)
