"""Windows of a level image: they cover it, and their detections join to those of the whole."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sniper.chips import LevelSpec
from sniper.data.images.files import ArrayImageReader
from sniper.data.images.regions import cut_window
from sniper.geometry import Detections
from sniper.inference.windows import GRID, Axis, Tiling, WindowDetections, join_windows


@given(st.integers(1, 5000), st.integers(256, 2048), st.floats(64, 3000))
def test_windows_cover_an_axis_overlap_and_lie_on_the_grid(length: int, limit: int, overlap: float) -> None:
    axis = Axis.of(length, limit=limit, overlap=overlap)
    assert axis.spans[0][0] == 0
    assert axis.spans[-1][1] == length
    assert all(start % GRID == 0 and 0 < stop - start <= limit for start, stop in axis.spans)
    # A step is at least one cell of the grid, however little overlap that leaves.
    expected = min(overlap, limit / 2, limit - GRID)
    for (_, stop), (start, _) in zip(axis.spans[:-1], axis.spans[1:], strict=True):
        assert stop - start >= expected - 1e-9  # pixels are whole, and the overlap is rounded


@given(st.integers(300, 3000), st.floats(0, 3000))
def test_one_window_is_responsible_for_a_centre_or_two_share_it(length: int, centre: float) -> None:
    axis = Axis.of(length, limit=256, overlap=100)
    centres = np.array([min(centre, float(length))])
    flags = [axis.responsible(index, centres) for index in range(len(axis.spans))]
    is_shared = [bool(shared[0]) for responsible, shared in flags if responsible[0]]
    assert is_shared in ([False], [True], [True, True])


def test_windows_have_distinct_corners_and_map_boxes_to_the_image() -> None:
    level = LevelSpec(factor=2.0, below=30).at(width=400, height=300)
    windows = list(Tiling.of(level, limit=256).windows())
    assert len({window.corners for window in windows}) == len(windows) > 4
    x1, y1, x2, y2 = windows[-1].corners
    assert (x2, y2) == (800, 600)
    assert windows[-1].sides == (x2 - x1, y2 - y1)
    box = np.array([[0.0, 0.0, 10.0, 20.0]])
    np.testing.assert_allclose(windows[-1].to_image(box) * 2, box + np.array([x1, y1, x1, y1]))


def test_sides_are_padded_to_the_grid() -> None:
    (window,) = Tiling.of(LevelSpec(factor=1.0).at(width=130, height=64), limit=256).windows()
    assert window.padded_sides == (192, 64)
    assert window.padded_sides.hw == (64, 192)


def test_a_network_computes_in_windows_what_it_computes_in_the_whole() -> None:
    image = np.random.default_rng(0).integers(0, 256, (330, 520, 3), dtype=np.uint8)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        *(torch.nn.Conv2d(inner, 8, 3, stride=2, padding=1) for inner in (3, 8, 8, 8))
    )

    def features_of(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            features: np.ndarray = network(
                torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
            ).numpy()[0]
        return features

    whole = features_of(image)
    tiling = Tiling.of(LevelSpec(factor=1.0, below=40).at(width=520, height=330), limit=256)
    windows = list(tiling.windows())
    assert len(windows) > 2
    num_compared = 0
    for window in windows:
        features = features_of(cut_window(ArrayImageReader(image), window.level, window.corners))
        x1, y1, x2, y2 = (corner // 16 for corner in window.corners)
        # Away from inner borders by more than the receptive field of a cell.
        left, top = (0 if x1 == 0 else 1), (0 if y1 == 0 else 1)
        right = features.shape[2] if x2 >= 520 // 16 else features.shape[2] - 1
        bottom = features.shape[1] if y2 >= 330 // 16 else features.shape[1] - 1
        inner = features[:, top:bottom, left:right]
        np.testing.assert_allclose(inner, whole[:, y1 + top : y1 + bottom, x1 + left : x1 + right], atol=1e-4)
        num_compared += inner[0].size
    assert num_compared >= whole[0].size


def window_detections(boxes: list[list[float]], *, column: int) -> WindowDetections:
    """Detections of one of two windows, [0, 256) and [128, 384), of a level as large as its image."""
    level = LevelSpec(factor=1.0, below=40).at(width=384, height=100)
    tiling = Tiling(level=level, x_axis=Axis(spans=((0, 256), (128, 384))), y_axis=Axis(spans=((0, 100),)))
    window = list(tiling.windows())[column]
    in_image = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    detections = Detections(
        boxes=in_image - np.array([window.corners[0], 0, window.corners[0], 0]),
        scores=np.linspace(0.9, 0.8, len(boxes)),
        labels=np.zeros(len(boxes), dtype=np.int64),
    )
    return WindowDetections.of(window, detections, in_valid_range=True)


def test_a_window_keeps_the_centres_and_sizes_it_is_responsible_for() -> None:
    kept = window_detections(
        [[10, 10, 30, 30], [10, 10, 90, 90], [180, 10, 204, 30], [230, 10, 250, 30]], column=0
    )
    assert kept.detections.boxes.tolist() == [[10, 10, 30, 30], [180, 10, 204, 30]]
    assert kept.is_shared.tolist() == [False, True]


def test_an_object_on_the_line_between_windows_is_joined_once() -> None:
    left = window_detections([[180, 10, 200, 30], [20, 10, 40, 30]], column=0)
    right = window_detections([[181, 10, 201, 30], [300, 10, 320, 30]], column=1)
    joined = join_windows([left, right])
    assert sorted(joined.boxes[:, 0].tolist()) == [20, 180, 300]


def test_a_truncated_box_is_dropped_where_a_window_has_the_whole() -> None:
    truncated = window_detections([[128, 10, 150, 30]], column=1)
    assert truncated.detections.boxes.tolist() == []  # the left window is responsible
    truncated = window_detections([[170, 10, 256, 20]], column=0)
    whole = window_detections([[170, 10, 290, 22]], column=1)
    assert truncated.is_truncated.tolist() in ([True], [])
    assert not whole.is_truncated.any()
    assert len(join_windows([whole])) == len(join_windows([truncated, whole])) == 1


def test_no_windows_join_to_no_detections() -> None:
    assert len(join_windows([])) == 0
