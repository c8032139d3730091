"""The focus head: which cells it learns, its loss against plain sums, and the cells that it predicts."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from sniper.chips import BoxStatus
from sniper.data.batches import Batch, ChipSample
from sniper.geometry.boxes import Sides
from sniper.models.focus_head import FocusHead, match_cells
from sniper.models.matching import Match
from sniper.models.spec import DetectorSpec, TorchvisionSpec
from tests.models.batches import (
    TINY,
    build_batch,
    build_sample,
    build_tiny,
    check_is_mean_over_parts,
    check_learns_nothing,
    with_pyramid,
)

V, OUT, IGN = BoxStatus.VALID, BoxStatus.OUT_OF_RANGE, BoxStatus.IGNORE
CONCAT = dataclasses.replace(TINY, focus=True)
FPN = with_pyramid(CONCAT)


def coarse_sample(
    boxes: list[list[float]], status: list[BoxStatus], *, at_least: float = 24.0, seed: int = 0
) -> ChipSample:
    return dataclasses.replace(build_sample(boxes, status, seed=seed), valid_sizes=(at_least, float("inf")))


def states(sample: ChipSample, *, stride: int = 16) -> np.ndarray:
    (state,) = match_cells(
        build_batch(sample).targets, sides=Sides(128, 128), stride=stride, shape=(128 // stride,) * 2
    ).numpy()
    return state


def cells(state: np.ndarray, kind: Match) -> set[tuple[int, int]]:
    """Return the row and column of the cells of a kind."""
    return {(int(row), int(column)) for row, column in np.argwhere(state == kind)}


@pytest.mark.parametrize(
    ("box", "status", "kind"),
    [
        ([50, 20, 60, 30], OUT, Match.POSITIVE),  # below the range of the level
        ([50, 20, 51, 21], OUT, Match.POSITIVE),  # however small
        ([34, 20, 57.9, 43.9], OUT, Match.POSITIVE),
        ([34, 20, 58, 44], V, Match.IGNORED),  # 24 px: both levels answer for such sizes
        ([34, 20, 67.9, 53.9], V, Match.IGNORED),  # 33.9 px
        ([34, 20, 68, 54], V, Match.NEGATIVE),  # 34 px, above 24 times the root of 2
        ([50, 20, 60, 30], IGN, Match.IGNORED),
        ([0, 20, 10, 30], OUT, Match.IGNORED),  # truncated, so that its size is unknown
        ([118, 20, 128, 30], OUT, Match.IGNORED),
        ([50, 0, 60, 10], V, Match.IGNORED),
        ([0, 0, 64, 64], OUT, Match.NEGATIVE),  # truncated, and too large anyway
    ],
)
def test_a_cell_is_treated_as_the_object_that_it_overlaps(
    box: list[float], status: BoxStatus, kind: Match
) -> None:
    state = states(coarse_sample([box], [status]))
    x1, y1, x2, y2 = box
    overlapped = {
        (row, column)
        for row in range(8)
        for column in range(8)
        if 16 * column < x2 and 16 * column + 16 > x1 and 16 * row < y2 and 16 * row + 16 > y1
    }
    assert overlapped <= cells(state, kind)
    others = set(np.ndindex(8, 8)) - overlapped
    assert others <= cells(state, Match.NEGATIVE)


def test_a_small_object_counts_before_an_ignored_one() -> None:
    state = states(coarse_sample([[20, 20, 50, 50], [36, 36, 44, 44]], [IGN, OUT]))
    assert cells(state, Match.POSITIVE) == {(2, 2)}
    assert cells(state, Match.IGNORED) == {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)} - {(2, 2)}


def test_nothing_is_left_to_levels_finer_than_the_finest() -> None:
    state = states(coarse_sample([[36, 36, 44, 44]], [V], at_least=0.0))
    assert (state == Match.IGNORED).all()


def two_chips() -> Batch:
    first = coarse_sample([[20, 20, 30, 30], [40, 40, 68, 68], [70, 70, 120, 120]], [OUT, V, V])
    second = coarse_sample([[60, 10, 70, 20]], [OUT], seed=7)
    return build_batch(first, second)


def test_the_loss_is_the_mean_over_chips_and_cells_that_are_not_ignored() -> None:
    torch.manual_seed(0)
    head = FocusHead(channels=8, num_channels=6, strides=(16,), loss_weight=1.5)
    batch = two_chips()
    maps = [torch.randn(2, 6, 8, 8)]
    logits = head(maps)
    state = match_cells(batch.targets, sides=Sides(128, 128), stride=16, shape=(8, 8))
    expected = [
        functional.binary_cross_entropy_with_logits(
            of_chip[kinds != Match.IGNORED], (kinds[kinds != Match.IGNORED] == Match.POSITIVE).float()
        )
        for of_chip, kinds in zip(logits, state, strict=True)
    ]
    loss = head.losses(maps, batch.targets, sides=Sides(128, 128))["focus"]
    assert (state == Match.IGNORED).any()
    torch.testing.assert_close(loss, 1.5 * torch.stack(expected).mean())


@pytest.mark.parametrize("spec", [CONCAT, FPN])
def test_chips_of_the_finest_level_teach_the_head_nothing(spec: DetectorSpec) -> None:
    """All of its layers have gradients, as DistributedDataParallel requires."""
    model = build_tiny(spec).train()
    batch = build_batch(build_sample([[20, 20, 30, 30]], [V]), build_sample([], []))
    check_learns_nothing(model, batch, head=model.focus_head, loss="focus")


@pytest.mark.parametrize("spec", [CONCAT, FPN])
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(spec: DetectorSpec) -> None:
    check_is_mean_over_parts(spec, two_chips(), loss="focus")


@pytest.mark.parametrize("spec", [CONCAT, FPN])
def test_without_the_head_everything_else_is_the_same(spec: DetectorSpec) -> None:
    plain = build_tiny(dataclasses.replace(spec, focus=False)).train()
    model = build_tiny(spec).train()
    tensors, others = plain.state_dict(), model.state_dict()
    assert {name for name in others if name not in tensors} == {
        f"focus_head.{layer}.{kind}" for layer in ("hidden", "logit") for kind in ("weight", "bias")
    }
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    losses, more = plain.losses(two_chips()), model.losses(two_chips())
    assert more.keys() - losses.keys() == {"focus"}
    assert all(torch.equal(loss, more[name]) for name, loss in losses.items())


@pytest.mark.parametrize("spec", [CONCAT, FPN])
def test_the_head_learns_where_small_objects_are(spec: DetectorSpec) -> None:
    torch.manual_seed(0)
    pixels = np.zeros((128, 128, 3), dtype=np.uint8)
    pixels[20:30, 84:94] = pixels[100:110, 36:46] = 255
    sample = dataclasses.replace(
        coarse_sample([[84, 20, 94, 30], [36, 100, 46, 110]], [OUT, OUT]), pixels=pixels
    )
    batch, model = build_batch(sample), build_tiny(spec).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.losses(batch)["focus"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    _, (found,) = model.detect_focused(list(batch.images), None)
    expected = states(sample, stride=found.stride) == Match.POSITIVE
    assert expected.any()
    np.testing.assert_array_equal(found.probabilities > 0.5, expected)


@pytest.mark.parametrize("spec", [CONCAT, FPN])
@pytest.mark.parametrize(("height", "width"), [(100, 70), (33, 129)])
def test_cells_cover_images_of_any_sides_and_detections_are_those_without_the_head(
    spec: DetectorSpec, height: int, width: int
) -> None:
    model = build_tiny(spec).eval()
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    detections, (found,) = model.detect_focused([image], None)
    assert found.stride == (16 if spec is CONCAT else 8)
    assert found.probabilities.shape == (-(-height // found.stride), -(-width // found.stride))
    assert found.probabilities.dtype == np.float32
    assert ((found.probabilities > 0) & (found.probabilities < 1)).all()
    (expected,) = model.detect([image])
    np.testing.assert_array_equal(detections[0].boxes, expected.boxes)
    np.testing.assert_array_equal(detections[0].scores, expected.scores)


def test_half_precision_gives_finite_losses_and_cells() -> None:
    model = build_tiny(CONCAT).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.losses(two_chips())["focus"]
        _, (found, _) = model.eval().detect_focused(list(two_chips().images), None)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert np.isfinite(found.probabilities).all()


def test_a_detector_without_the_head_has_no_cells() -> None:
    with pytest.raises(ValueError, match="this detector has no focus head"):
        build_tiny().eval().detect_focused([torch.zeros(3, 64, 64, dtype=torch.uint8)], None)


def test_fields_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="focus: is of kind two_stage, not of torchvision"):
        DetectorSpec(kind="torchvision", name="fcos_resnet50_fpn", focus=True, torchvision=TorchvisionSpec())
    with pytest.raises(ValueError, match="focus_loss_weight: needs focus"):
        DetectorSpec(focus_loss_weight=2.0)
