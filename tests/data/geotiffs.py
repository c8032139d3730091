"""Small georeferenced images on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import Affine

UTM = "EPSG:32633"
NORTH_UP = Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000)


def compose(*transforms: Affine) -> Affine:
    """Return the transform that applies the last one first; the operator for it depends on the version of affine."""
    matrix = np.linalg.multi_dot([np.eye(3), *(np.reshape(tuple(each), (3, 3)) for each in transforms)])
    return Affine(*matrix.ravel()[:6].tolist())


def moved(columns: float) -> Affine:
    """Return the transform `NORTH_UP` of an image some pixels to the east."""
    return compose(NORTH_UP, Affine.translation(columns, 0))


def write_geotiff(
    path: Path,
    pixels: np.ndarray | None = None,
    *,
    crs: Any = UTM,
    transform: Affine | None = NORTH_UP,
    width: int = 64,
    height: int = 48,
    tags: dict[str, str] | None = None,
    **options: Any,
) -> Path:
    """Write a GeoTIFF of RGB pixels, black ones by default; return its path."""
    if pixels is None:
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
    height, width, bands = pixels.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"driver": "GTiff", **options}
    with rasterio.open(
        path,
        "w",
        width=width,
        height=height,
        count=bands,
        dtype=pixels.dtype,
        crs=crs,
        transform=transform,
        **options,
    ) as file:
        file.update_tags(**(tags or {}))
        file.write(np.moveaxis(pixels, 2, 0))
    return path
