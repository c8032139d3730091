"""Search a large made-up GeoTIFF in windows, and compare the GeoJSON with what was drawn.

Prints JSON: seconds, peak memory, and the largest distance of a corner, in pixels, by rasterio and, if it is installed,
by pyproj. The detector finds bright rectangles, so that every answer is known.

    python benchmarks/georeferenced.py FOLDER [--side 20000] [--count 2000]
"""

import argparse
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rasterio
import torch
from rasterio.transform import Affine
from rasterio.windows import Window

from sniper.chips import LevelSpec
from sniper.config.experiment import PredictSpec
from sniper.data.datasets import Category
from sniper.data.spec import ReadSpec
from sniper.geometry import Detections
from sniper.inference.detector import Detector
from sniper.inference.georeferenced import GeoreferencedImages, write_georeferenced
from sniper.inference.results import ImageToSearch, search_to_file

CRS = "EPSG:32633"
PIXEL = 0.3  # metres
ANGLE = np.deg2rad(12)
CELL = 100  # pixels of a grid with at most one rectangle in each cell
BLOCK = 512


def find_rectangles(images: Sequence[torch.Tensor]) -> list[Detections]:
    """Return the bright rectangles of images."""
    results = []
    for image in images:
        bright = (image[0].numpy() > 128).astype(np.uint8)
        x, y, width, height, _ = cv2.connectedComponentsWithStats(bright)[2][1:].T.astype(np.float64)
        boxes = np.stack([x, y, x + width, y + height], axis=1)
        results.append(
            Detections(
                boxes=boxes,
                scores=np.full(len(boxes), 0.9),
                labels=np.zeros(len(boxes), dtype=np.int64),
            )
        )
    return results


def draw(path: Path, *, side: int, count: int) -> np.ndarray:
    """Write a GeoTIFF with bright rectangles, and return their boxes."""
    rng = np.random.default_rng(0)
    cells = rng.choice((side // CELL) ** 2, size=count, replace=False)
    corners = np.stack([cells % (side // CELL), cells // (side // CELL)], axis=1) * CELL
    corners += rng.integers(8, CELL // 2, corners.shape)
    boxes = np.concatenate([corners, corners + rng.integers(8, CELL // 2 - 8, corners.shape)], axis=1)
    a, b = PIXEL * np.cos(ANGLE), PIXEL * np.sin(ANGLE)
    options = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "count": 3,
        "dtype": "uint8",
        "crs": CRS,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "photometric": "RGB",
    }
    with rasterio.open(path, "w", transform=Affine(a, b, 500_000, b, -a, 5_400_000), **options) as file:
        for top in range(0, side, BLOCK):
            rows = np.zeros((min(BLOCK, side - top), side), dtype=np.uint8)
            for x1, y1, x2, y2 in boxes[(boxes[:, 1] < top + BLOCK) & (boxes[:, 3] > top)].tolist():
                rows[max(y1 - top, 0) : max(y2 - top, 0), x1:x2] = 255
            window = Window(0, top, side, len(rows))
            file.write(np.broadcast_to(rows, (3, *rows.shape)), window=window)
    return boxes


def search(path: Path, *, count: int) -> Path:
    """Search an image, and return the path of its GeoJSON."""
    spec = PredictSpec(levels=(LevelSpec(factor=1.0),), merge="hard", max_detections=2 * count)
    detector = Detector(
        detect=find_rectangles,
        spec=spec,
        categories=(Category(category_id=1, name="rectangle"),),
        device=torch.device("cpu"),
    )
    images = [ImageToSearch(image_id=1, path=path, file_name=path.name)]
    found = GeoreferencedImages.find(images, ReadSpec())
    geojson = path.with_suffix(".geojson")

    def write(read: Any) -> None:
        write_georeferenced(
            found,
            images,
            lambda index: read(index).confident(0.3),
            read=ReadSpec(),
            geojson=geojson,
            gpkg=None,
        )

    search_to_file(
        detector,
        images,
        path.with_suffix(".json"),
        source={},
        existing="replace",
        on_progress=lambda *_: None,
        on_results=write,
    )
    return geojson


def to_pixels(rings: np.ndarray, path: Path, *, library: str) -> np.ndarray:
    """Return rings of longitudes and latitudes as pixels, transformed by rasterio or pyproj."""
    longitudes, latitudes = rings.reshape(-1, 2).T
    with rasterio.open(path) as file:
        if library == "rasterio":
            xs, ys = rasterio.warp.transform("EPSG:4326", file.crs, longitudes, latitudes)
        else:
            import pyproj

            there = pyproj.Transformer.from_crs("EPSG:4326", CRS, always_xy=True)
            xs, ys = there.transform(longitudes, latitudes)
        rows, columns = rasterio.transform.rowcol(file.transform, xs, ys, op=np.positive)
    return np.stack([columns, rows], axis=1).reshape(rings.shape)


def compare(geojson: Path, image: Path, boxes: np.ndarray, *, library: str) -> float:
    """Return the largest distance of a corner from where it was drawn, pixels."""
    features = json.loads(geojson.read_text())["features"]
    rings = np.array([feature["geometry"]["coordinates"][0] for feature in features])
    pixels = to_pixels(rings, image, library=library)
    found = np.concatenate([pixels.min(axis=1), pixels.max(axis=1)], axis=1)
    if len(found) != len(boxes):
        raise SystemExit(f"found {len(found)} rectangles of {len(boxes)}")
    order = [np.lexsort(rows[:, :2].round().T) for rows in (found, boxes)]
    return float(np.abs(found[order[0]] - boxes[order[1]]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--count", type=int, default=2_000)
    options = parser.parse_args()
    path = options.folder / "large.tif"
    boxes = draw(path, side=options.side, count=options.count)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    geojson = search(path, count=options.count)
    result: dict[str, Any] = {
        "side": options.side,
        "rectangles": len(boxes),
        "seconds": round(time.process_time() - started, 1),
        "megabytes_before": before // 1024,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "largest_error_rasterio": compare(geojson, path, boxes, library="rasterio"),
    }
    try:
        result["largest_error_pyproj"] = compare(geojson, path, boxes, library="pyproj")
    except ImportError:
        result["largest_error_pyproj"] = None
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
