"""The suggested experiment fits the chips of a plan."""

import dataclasses

import numpy as np
import pytest

from sniper.chips import PyramidSpec
from sniper.chips.cover import cover
from sniper.data.spec import DataSpec, SourceSpec
from sniper.planning.cost import CostPlan, compute_cost
from sniper.planning.experiment import fit_anchors, suggest_experiment
from sniper.training.pace import SEARCH_SHARE
from tests.chips.worlds import build_world

DATA = DataSpec(train=SourceSpec(annotations="/data/train.json"), follow_links=True)


def cost_of(num_images: int, *, chip_size: int = 512) -> CostPlan:
    world = build_world(0, num_images=num_images, longest=600)
    levels = (*PyramidSpec().levels[:-1], dataclasses.replace(PyramidSpec().levels[-1], long_side=chip_size))
    pyramid = PyramidSpec(chip_size=chip_size, levels=levels)
    return compute_cost(cover(pyramid, world, generator=np.random.default_rng(0)), world, pyramid=pyramid)


def cost_of_sizes(sizes: list[float]) -> CostPlan:
    """Return a plan whose chips show boxes of these sizes."""
    cost = cost_of(1)
    level = dataclasses.replace(cost.levels[0], sizes=np.repeat(np.array(sizes), 50))
    return dataclasses.replace(cost, levels=(level,))


@pytest.mark.parametrize("num_images", [1, 100, 3000])
def test_the_warm_up_is_a_small_share_of_the_steps(num_images: int) -> None:
    cost = cost_of(num_images)
    train = suggest_experiment(cost, data=DATA, is_scored=True).train
    steps = train.epochs * cost.num_steps(train.batch_size)
    assert train.warmup_steps <= 0.05 * steps + 0.5
    assert all(0 < milestone < train.epochs for milestone in train.milestones)


def test_small_sets_are_trained_for_more_epochs_within_bounds() -> None:
    epochs = [suggest_experiment(cost_of(number), data=DATA).train.epochs for number in (1, 100, 200, 3000)]
    assert epochs[0] == 50
    assert 12 < epochs[2] < 50
    assert epochs[-1] == 12
    assert epochs == sorted(epochs, reverse=True)


@pytest.mark.parametrize(
    ("on_gpu", "chip_size", "batch_size"),
    [
        (False, 256, 16),
        (False, 384, 8),
        (False, 512, 8),
        (False, 768, 4),
        (False, 1024, 4),
        (True, 256, 32),
        (True, 512, 16),
        (True, 1024, 8),
    ],
)
def test_large_chips_come_in_small_batches(on_gpu: bool, chip_size: int, batch_size: int) -> None:
    spec = suggest_experiment(cost_of(300, chip_size=chip_size), data=DATA, on_gpu=on_gpu)
    assert spec.train.batch_size == batch_size
    on_cpu = suggest_experiment(cost_of(300, chip_size=chip_size), data=DATA)
    assert spec.train.reference_batch_size == on_cpu.train.reference_batch_size == on_cpu.train.batch_size


def test_small_sets_are_trained_in_smaller_batches() -> None:
    sizes = [
        suggest_experiment(cost_of(number), data=DATA, on_gpu=True).train.batch_size
        for number in (1, 30, 300)
    ]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (8, 16)


def test_test_images_are_evaluated_while_it_trains() -> None:
    spec = suggest_experiment(cost_of(3), data=DATA, is_scored=True)
    assert spec.data == DATA
    assert spec.train.evaluate_every is not None
    assert suggest_experiment(cost_of(3), data=DATA).train.evaluate_every is None


def test_a_short_training_has_no_negative_chips() -> None:
    short, long = (suggest_experiment(cost_of(3), data=DATA, epochs=epochs) for epochs in (4.9, 5))
    assert (short.negatives.source, long.negatives.source) == ("none", "self")
    assert short.mine.share == 1  # nothing is searched


@pytest.mark.parametrize("epochs", [5, 12, 50, 1000])
def test_the_search_for_negative_chips_is_a_tenth_of_the_training_at_most(epochs: int) -> None:
    cost = cost_of(100)
    share = suggest_experiment(cost, data=DATA, epochs=epochs).mine.share
    searched = share * cost.megapixels.pyramid * cost.num_images
    trained = epochs * cost.megapixels.chips * cost.num_images_with_boxes
    assert 0 < share <= 1
    assert SEARCH_SHARE * searched <= 0.1 * trained
    assert (
        share == 1
        or SEARCH_SHARE * (searched + 0.01 * cost.megapixels.pyramid * cost.num_images) > 0.1 * trained
    )


@pytest.mark.parametrize(
    ("sizes", "anchors"),
    [
        ([32.0], (32,)),
        ([20.0, 90.0], (16, 32, 64)),  # 22.6 and 90.5 px are half-way
        ([24.0, 100.0], (32, 64, 128)),
        ([40.0, 480.0], (32, 64, 128, 256, 512)),
        ([512.0, 512.0], (512,)),
        ([], (32, 64, 128, 256, 384)),
    ],
)
def test_anchors_are_powers_of_2_around_the_sizes(sizes: list[float], anchors: tuple[float, ...]) -> None:
    assert fit_anchors(cost_of_sizes(sizes)) == anchors


def test_nearly_every_square_has_an_anchor_of_at_least_half_its_union() -> None:
    cost = cost_of(50)
    sizes = np.concatenate([level.sizes for level in cost.levels])
    ratios = sizes[:, None] / np.array(fit_anchors(cost))
    best = (np.minimum(ratios, 1 / ratios) ** 2).max(axis=1)
    assert (best >= 0.499).mean() >= 0.88
