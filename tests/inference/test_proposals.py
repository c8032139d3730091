"""Proposals on disk: what goes in comes out to a fraction of a pixel, and what does not belong is refused."""

from pathlib import Path

import numpy as np
import pytest

from sniper.chips.negatives import NegativeSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import build_table, order_chips
from sniper.errors import ProposalsError
from sniper.inference import proposals as module
from sniper.inference.proposals import ProposalStore, ShardProposals, add_negatives
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset


@pytest.fixture
def annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 3)  # four images: two shards
    return load_dataset(write_dataset(tmp_path))


def found_in(annotations: Dataset, images: range, *, count: int = 50) -> ShardProposals:
    rng = np.random.default_rng(images.start)
    sides = np.stack([annotations.widths, annotations.heights] * 2, axis=1)[np.repeat(list(images), count)]
    low = rng.uniform(0, 0.8, (len(sides), 2))
    boxes = np.concatenate([low, low + rng.uniform(0.02, 0.2, low.shape)], axis=1) * sides
    return ShardProposals(
        offsets=np.arange(len(images) + 1) * count, boxes=boxes, scores=rng.uniform(0, 1, len(boxes))
    )


def filled(folder: Path, annotations: Dataset) -> ProposalStore:
    store = ProposalStore.begin(folder, annotations, source={"weights": "abc"})
    for shard in store.missing:
        store.write(shard, found_in(annotations, store.images_of(shard)))
    return store


def test_proposals_come_back_as_they_were_to_a_fraction_of_a_pixel(
    annotations: Dataset, tmp_path: Path
) -> None:
    filled(tmp_path / "found", annotations)
    store = ProposalStore.open(tmp_path / "found", annotations)
    assert [images for images, _ in store] == [range(3), range(3, 4)]
    for images, found in store:
        wanted = found_in(annotations, images)
        np.testing.assert_array_equal(found.offsets, wanted.offsets)
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=200 / 65_535)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-3)


def test_what_is_missing_is_told_and_gone_on_with(annotations: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "found"
    store = ProposalStore.begin(folder, annotations, source={"weights": "abc"})
    store.write(1, found_in(annotations, store.images_of(1)))
    assert store.missing == [0]
    with pytest.raises(ProposalsError, match="1 of 2 shards are missing"):
        ProposalStore.open(folder, annotations)
    assert ProposalStore.begin(folder, annotations, source={"weights": "abc"}).missing == [0]
    assert ProposalStore.begin(folder, annotations, source={"weights": "other"}).missing == [0, 1]


def test_a_damaged_shard_is_told(annotations: Dataset, tmp_path: Path) -> None:
    store = filled(tmp_path / "found", annotations)
    path = tmp_path / "found" / "00000.npz"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    num_told = 0
    for place in rng.integers(0, len(whole), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            store.read(0)
        except ProposalsError as error:
            num_told += "00000.npz" in str(error)
    assert num_told > 30


def test_an_unfinished_store_is_begun_anew(annotations: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "found"
    folder.mkdir()
    for name in ("00001.npz", ".head.json.123", ".00000.npz.77"):
        (folder / name).write_bytes(b"")
    assert ProposalStore.begin(folder, annotations, source={}).missing == [0, 1]


def test_what_does_not_belong_is_refused(annotations: Dataset, tmp_path: Path) -> None:
    filled(tmp_path / "found", annotations)
    with pytest.raises(ProposalsError, match="found in other images"):
        ProposalStore.open(tmp_path / "found", annotations.select(np.array([0, 1])))
    with pytest.raises(ProposalsError, match="holds no proposals"):
        ProposalStore.open(tmp_path / "none", annotations)
    with pytest.raises(ProposalsError, match="something else than proposals"):
        ProposalStore.begin(tmp_path, annotations, source={})
    (tmp_path / "found" / "00001.npz").write_bytes(b"cut short")
    with pytest.raises(ProposalsError, match=r"00001\.npz: not proposals"):
        list(ProposalStore.open(tmp_path / "found", annotations))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "head.json").write_text('{"mine": 1}')
    with pytest.raises(ProposalsError, match="something else than proposals"):
        ProposalStore.begin(tmp_path / "other", annotations, source={})
    assert (tmp_path / "other" / "head.json").exists()
    (tmp_path / "found" / "thesis.txt").write_text("")
    with pytest.raises(ProposalsError, match="something else than proposals"):
        ProposalStore.begin(tmp_path / "found", annotations, source={"weights": "other"})
    (tmp_path / "found" / "head.json").write_text("{}")
    with pytest.raises(ProposalsError, match="keys are missing"):
        ProposalStore.open(tmp_path / "found", annotations)


def test_negative_chips_are_chosen_shard_by_shard_and_drawn_each_epoch(
    annotations: Dataset, tmp_path: Path
) -> None:
    store = filled(tmp_path / "found", annotations)
    positives = build_table(annotations, SMALL_PYRAMID, generator=np.random.default_rng(0))
    table = add_negatives(
        positives,
        store,
        NegativeSpec(min_proposals=(2,)),
        pyramid=SMALL_PYRAMID,
        generator=np.random.default_rng(0),
    )
    pool = np.bincount(table.image_indices[table.is_negative], minlength=4)
    assert (pool > 1).all()
    assert (~table.is_negative).sum() == len(positives)
    table.save(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest=annotations.digest)
    again = type(table).load(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest=annotations.digest)
    np.testing.assert_array_equal(again.is_negative, table.is_negative)

    plans = [
        order_chips(
            annotations,
            SMALL_PYRAMID,
            batch_size=4,
            flip=0.0,
            seed=0,
            epoch=epoch,
            table=again,
            negatives_per_image=1,
        )
        for epoch in range(2)
    ]
    for plan in plans:
        assert plan.table.is_negative.sum() == 4
        assert len(plan.table) == len(positives) + 4
    drawn = [plan.table.x[plan.table.is_negative].tolist() for plan in plans]
    assert drawn[0] != drawn[1]
