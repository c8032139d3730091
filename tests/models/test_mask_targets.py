"""Polygons rasterised on a device, against the kernel that does it one by one."""

import numpy as np
import pytest
import torch

from sniper.geometry.boxes import Sides
from sniper.geometry.masks import MaskArrays, rasterize_rings
from sniper.models import mask_targets
from sniper.models.mask_targets import rasterize_on_device
from tests.devices import DEVICES


def random_masks(seed: int) -> MaskArrays:
    """Draw objects of no, one or several polygons, some of whole numbers, some with repeated points and flat edges."""
    rng = np.random.default_rng(seed)
    objects = []
    for _ in range(20):
        rings = [rng.uniform(-10, 50, (rng.integers(3, 12), 2)) for _ in range(rng.integers(0, 5))]
        objects.append([ring.round() if rng.random() < 0.5 else np.repeat(ring, 2, axis=0) for ring in rings])
    return MaskArrays.from_rings(objects)


def random_regions(seed: int, count: int) -> np.ndarray:
    """Draw regions, many of which have the centres of their cells on whole numbers, where the edges of masks are."""
    rng = np.random.default_rng(seed)
    corners, sides = rng.uniform(-5, 30, (count, 2)), rng.uniform(0.5, 40, (count, 2))
    is_whole = rng.random(count) < 0.5
    corners[is_whole] = corners[is_whole].round() - 0.5
    sides[is_whole] = 28
    return np.concatenate([corners, corners + sides], axis=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(4))
def test_rasters_have_the_bits_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: type, seed: int
) -> None:
    masks = random_masks(seed)
    rows = np.random.default_rng(seed).integers(0, len(masks), 100)
    rings = np.stack([masks.offsets[:-1], masks.offsets[1:]], axis=1)[rows]
    regions = random_regions(seed, 100).astype(np.float32)
    arrays: tuple[np.ndarray, ...] = (masks.points.astype(dtype), masks.ring_offsets, rings, regions)
    expected = rasterize_rings(*arrays, sides=Sides(28, 28))
    assert 0 < expected.mean() < 1
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    assert (rasterize_on_device(*tensors, side=28).cpu().numpy() == expected).all()
    for crossings in (1, 28 * 100):  # a few polygons at once, also fewer than one
        monkeypatch.setattr(mask_targets, "_MOST_CROSSINGS", crossings)
        assert (rasterize_on_device(*tensors, side=28).cpu().numpy() == expected).all()


def test_there_may_be_nothing_to_rasterise() -> None:
    empty = torch.zeros(0, 2), torch.zeros(1, dtype=torch.long)
    nothing = rasterize_on_device(*empty, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 4), side=4)
    assert nothing.shape == (0, 4, 4)
    bare = rasterize_on_device(
        *empty, torch.zeros(3, 2, dtype=torch.long), torch.tensor([[0.0, 0, 4, 4]] * 3), side=4
    )
    assert not bare.any()
