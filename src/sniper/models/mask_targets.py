"""Rasterise polygons on the device of a batch, to the bits of `sniper.geometry.masks.rasterize_rings`."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

_MOST_CROSSINGS = 1 << 22  # of edges with rows of cells at once: some arrays of 32 MB


def rasterize_on_device(
    points: Float[torch.Tensor, "p 2"],
    ring_offsets: Int[torch.Tensor, " r_plus_1"],
    rings: Int[torch.Tensor, "k 2"],
    regions: Float[torch.Tensor, "k 4"],
    *,
    side: int,
) -> Bool[torch.Tensor, "k s s"]:
    """Rasterise polygons, each union of rings in a region of its own; see `sniper.geometry.masks.rasterize`.

    All edges of many polygons are computed at once. Only their number is read from the device, to bound memory.

    Args:
        points: (p, 2) xy of the corners of all rings.
        ring_offsets: (r + 1,) where the points of each ring begin.
        rings: (k, 2) the first ring of each object, and the one after its last; equal where it has no mask.
        regions: (k, 4) xyxy, in the frame of the points, with an area.
        side: of a raster, cells.
    """
    num_points = ring_offsets[rings[:, 1]] - ring_offsets[rings[:, 0]]
    totals = torch.cumsum(num_points, dim=0).cpu().numpy()
    most = max(_MOST_CROSSINGS // side, 1)
    edges = np.searchsorted(
        totals, np.arange(most, (totals[-1] if len(totals) else 0) + most, most), side="right"
    )
    rasters = torch.zeros((len(rings), side, side), dtype=torch.bool, device=points.device)
    for first, stop in zip([0, *edges[:-1].tolist()], [*edges[:-1].tolist(), len(rings)], strict=True):
        rasters[first:stop] = _rasterize(
            points.double(), ring_offsets, rings[first:stop], regions[first:stop].double(), side=side
        )
    return rasters


def _rasterize(
    points: Float[torch.Tensor, "p 2"],
    ring_offsets: Int[torch.Tensor, " r_plus_1"],
    rings: Int[torch.Tensor, "k 2"],
    regions: Float[torch.Tensor, "k 4"],
    *,
    side: int,
) -> Bool[torch.Tensor, "k s s"]:
    """Count in each row of cells the edges left of each centre: inside a ring it is odd."""
    box, ring = _members(rings[:, 0], rings[:, 1] - rings[:, 0])  # (q,) of each ring of each region
    edge_ring, start = _members(ring_offsets[ring], ring_offsets[ring + 1] - ring_offsets[ring])  # (e,)
    of_edge = ring[edge_ring]
    end = torch.where(start + 1 < ring_offsets[of_edge + 1], start + 1, ring_offsets[of_edge])
    region = regions[box[edge_ring]]
    step = (region[:, 2:] - region[:, :2]) / side
    # Cell centres have whole coordinates. An edge and its reverse cross at equal numbers.
    a, b = ((points[index] - region[:, :2]) / step - 0.5 for index in (start, end))
    is_reverse = (a[:, 1] > b[:, 1])[:, None]
    a, b = torch.where(is_reverse, b, a), torch.where(is_reverse, a, b)
    (ax, ay), (bx, by) = a.T[..., None], b.T[..., None]  # (e, 1) each
    row = torch.arange(side, device=points.device)
    is_crossed = (row >= ay.clamp(min=0.0).ceil()) & (row < by.clamp(max=float(side)).ceil())  # (e, s)
    crossing = ax + (row - ay) * ((bx - ax) / (by - ay))
    is_crossed &= crossing <= side - 1
    column = torch.where(is_crossed, crossing.clamp(min=0.0).ceil(), 0.0).long()
    flips = torch.zeros(len(ring) * side * side, dtype=torch.int32, device=points.device)
    cell = (edge_ring[:, None] * side + row) * side + column
    flips.scatter_add_(0, cell.flatten(), is_crossed.flatten().int())
    is_inside = flips.view(-1, side, side).cumsum(dim=2) % 2
    covers = torch.zeros((len(rings), side, side), dtype=is_inside.dtype, device=points.device)
    return covers.index_add_(0, box, is_inside) > 0


def _members(
    first: Int[torch.Tensor, " n"], counts: Int[torch.Tensor, " n"]
) -> tuple[Int[torch.Tensor, " m"], Int[torch.Tensor, " m"]]:
    """Return for each member of n groups its group, and its index: `first` of the group and those that follow."""
    group = torch.repeat_interleave(counts)
    before = counts.cumsum(dim=0) - counts
    index = torch.arange(len(group), device=first.device) - before[group] + first[group]
    return group, index
