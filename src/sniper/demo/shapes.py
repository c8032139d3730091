"""Draw a synthetic data set: shapes of all sizes on textured backgrounds.

The five classes differ in outline alone; colour, texture, size and rotation are random. Each class has a distractor
that differs from it in one detail and provokes false positives.
"""

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageChops, ImageDraw

from sniper.files import write_bytes
from sniper.geometry.boxes import Sides, area, empty_boxes, intersections

_FULL_TURN = 2 * math.pi
_ASPECTS = (0.7, 1.4)  # width to height, before rotation
_TRUNCATED_FRACTION = 0.04  # of shapes that extend over the border of the image
_OVERHANG = (0.1, 0.4)  # fraction of their width or height that is outside
_MAX_OVERLAP = 0.04  # fraction of the smaller of two boxes
_NUM_TRIES = 200  # positions tried before a shape is left out
_GROUP_SPREAD = 40.0  # standard deviation of positions in a group, pixels
_NUM_COLOURS = 24  # candidates, until one has enough contrast
_MIN_CONTRAST = 60.0  # grey levels between a shape and its surroundings
_LUMINANCE = np.array([0.299, 0.587, 0.114])
_JPEG_QUALITY = 95
_BACKGROUND_REDUCTION = 4  # the background is painted this much smaller, then enlarged
_GREY = 127.5
_GRAIN = 3  # grey levels, up and down

Rings = tuple[Float[np.ndarray, "_ 2"], ...]
"""Closed outlines, y down: the first is filled, the others are holes in it."""


@dataclass(frozen=True, kw_only=True)
class ShapesSpec:
    """The contents of a synthetic data set. Counts and sides are uniform between their bounds, sizes log-uniform.

    Attributes:
        num_images: number of images.
        min_side: of an image, pixels.
        max_side: of an image, pixels.
        min_objects: in an image.
        max_objects: in an image.
        min_distractors: in an image.
        max_distractors: in an image.
        min_size: of an object or distractor, pixels (square root of the area of its box).
        max_size: of an object or distractor, pixels.
        num_groups: groups in an image that its smaller shapes form, as cars do in car parks; 0 scatters all shapes.
        grouped_below: size from which shapes are scattered, pixels.
        background_range: share of the range of colours that the mean of a background is drawn from, around grey.
    """

    num_images: int = 40
    min_side: int = 1000
    max_side: int = 2000
    min_objects: int = 8
    max_objects: int = 24
    min_distractors: int = 4
    max_distractors: int = 12
    min_size: float = 8.0
    max_size: float = 400.0
    num_groups: int = 0
    grouped_below: float = 48.0
    background_range: float = 1.0

    def __post_init__(self) -> None:
        if self.num_images < 0:
            raise ValueError(f"num_images must not be negative, not {self.num_images}")
        if not 0 < self.min_side <= self.max_side:
            raise ValueError(f"expected 0 < min_side <= max_side, got {self.min_side}, {self.max_side}")
        if not 0 <= self.min_objects <= self.max_objects:
            raise ValueError(
                f"expected 0 <= min_objects <= max_objects, got {self.min_objects}, {self.max_objects}"
            )
        if not 0 <= self.min_distractors <= self.max_distractors:
            raise ValueError(
                f"expected 0 <= min_distractors <= max_distractors, "
                f"got {self.min_distractors}, {self.max_distractors}"
            )
        if not 0 < self.min_size <= self.max_size <= self.min_side / 2:
            raise ValueError(
                f"expected 0 < min_size <= max_size <= min_side / 2, "
                f"got {self.min_size}, {self.max_size} and {self.min_side}"
            )
        if self.num_groups < 0:
            raise ValueError(f"num_groups must not be negative, not {self.num_groups}")
        if not 0 <= self.background_range <= 1:
            raise ValueError(f"background_range must be from 0 to 1, not {self.background_range}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """An object or a distractor in an image.

    Attributes:
        kind: a key of `CLASSES` or of `DISTRACTORS`.
        rings: its outlines, image frame.
    """

    kind: str
    rings: Rings

    @property
    def box(self) -> Float[np.ndarray, " 4"]:
        """The tight box, xyxy, image frame; it may extend over the border of the image."""
        return np.concatenate([self.rings[0].min(axis=0), self.rings[0].max(axis=0)])


@dataclass(frozen=True, kw_only=True, eq=False)
class RasterShape:
    """A shape on the pixel grid, antialiased.

    Attributes:
        x: of its left column of pixels, image frame.
        y: of its upper row of pixels, image frame.
        mask: coverage of each pixel, 0 to 255.
        box: (4,) tight xyxy around the covered area, image frame, to an eighth or a quarter of a pixel.
    """

    x: int
    y: int
    mask: Image.Image
    box: Float[np.ndarray, " 4"]


def draw_shapes(folder: Path, *, spec: ShapesSpec, seed: int, name: str = "train") -> Path:
    """Write a data set: `images/NAME_000.jpg` and so on, and the objects in `NAME.json`, as COCO.

    Args:
        folder: created if it does not exist.
        spec: the contents.
        seed: equal seeds give equal bytes; image `i` does not depend on the number of images.
        name: of the split.

    Returns:
        The path of the JSON file.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    digits = max(3, len(str(spec.num_images - 1)))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(spec.num_images):
        generator = np.random.default_rng([seed, index])
        sides = Sides(*generator.integers(spec.min_side, spec.max_side + 1, size=2).tolist())
        shapes = place_shapes(spec, sides, generator=generator)
        background = paint_background(sides, colour_range=spec.background_range, generator=generator)
        picture = paint_shapes(background, shapes, generator=generator)
        file_name = f"{name}_{index:0{digits}d}.jpg"
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=_JPEG_QUALITY)
        write_bytes(folder / "images" / file_name, content.getvalue())
        images.append({"id": index + 1, "file_name": file_name, **sides._asdict()})
        for shape in shapes:
            if shape.kind in CLASSES:
                ids = {"id": len(annotations) + 1, "image_id": index + 1}
                annotations.append(ids | _to_annotation(shape, sides))
    categories = [{"id": category_id, "name": kind} for kind, category_id in _CATEGORY_IDS.items()]
    path = folder / f"{name}.json"
    content_of = {"images": images, "annotations": annotations, "categories": categories}
    write_bytes(path, json.dumps(content_of).encode())
    return path


def place_shapes(spec: ShapesSpec, sides: Sides, *, generator: np.random.Generator) -> tuple[Shape, ...]:
    """Draw the shapes of an image, largest first; a shape for which there is no free position is left out.

    Args:
        spec: the number of shapes, and their sizes.
        sides: of the image.
        generator: draws everything.
    """
    num_objects = int(generator.integers(spec.min_objects, spec.max_objects + 1))
    num_distractors = int(generator.integers(spec.min_distractors, spec.max_distractors + 1))
    drawn = [
        *_draw_sizes_and_kinds(CLASSES, num_objects, spec, generator),
        *_draw_sizes_and_kinds(DISTRACTORS, num_distractors, spec, generator),
    ]
    centres: list[Float[np.ndarray, " 2"]] = []
    shapes: list[Shape] = []
    boxes = empty_boxes()
    for index, (size, kind) in enumerate(sorted(drawn, reverse=True)):
        rings = _rotate_and_scale(_OUTLINES[kind](generator), size=size, generator=generator)
        extent = rings[0].max(axis=0)
        if spec.num_groups and size < spec.grouped_below:
            if not centres:  # all larger shapes have a position by now
                centres = [_choose_centre(sides, boxes, generator) for _ in range(spec.num_groups)]
            corners = _draw_corners_in_group(extent, sides, centres[index % spec.num_groups], generator)
        else:
            corners = _draw_corners(extent, sides, generator)
        corner = _first_free(corners, extent, boxes)
        if corner is not None:
            shapes.append(Shape(kind=kind, rings=tuple(ring + corner for ring in rings)))
            boxes = np.concatenate([boxes, shapes[-1].box[None]])
    return tuple(shapes)


def paint_background(
    sides: Sides, *, generator: np.random.Generator, colour_range: float = 1.0
) -> Image.Image:
    """Paint a background: noise of several scales, a gradient, sometimes stripes, in a few colours, with fine grain.

    Args:
        sides: of the image.
        generator: draws everything.
        colour_range: share of the range of colours that the mean is drawn from, around grey.
    """
    columns, rows = -(-sides.width // _BACKGROUND_REDUCTION), -(-sides.height // _BACKGROUND_REDUCTION)
    field = _noise(columns, rows, generator) + _gradient_and_stripes(columns, rows, generator)
    field = (field - field.min()) / (np.ptp(field) + 1e-9)  # (rows, columns)
    mean = _GREY + colour_range * (generator.uniform(40, 215, size=3) - _GREY)
    palette = np.clip(mean + generator.normal(0, 28, size=(4, 3)), 0, 255)
    stops = np.linspace(0, 1, len(palette))
    table = np.stack([np.interp(np.linspace(0, 1, 256), stops, palette[:, i]) for i in range(3)], axis=1)
    colours = table.astype(np.uint8)[(field * 255).astype(np.uint8)]  # (rows, columns, 3)
    smooth = Image.fromarray(colours).resize(sides, Image.Resampling.BICUBIC)
    grain = Image.fromarray(generator.integers(0, 2 * _GRAIN + 1, size=sides.hw, dtype=np.uint8))
    return ImageChops.add(smooth, Image.merge("RGB", (grain, grain, grain)), offset=-_GRAIN)


def paint_shapes(
    background: Image.Image, shapes: Sequence[Shape], *, generator: np.random.Generator
) -> Image.Image:
    """Paint shapes on a copy of a background, each in a colour that contrasts with its surroundings.

    Args:
        background: RGB.
        shapes: in the background's frame, bottom to top.
        generator: draws colours and textures.
    """
    picture = background.copy()
    for shape in shapes:
        raster = rasterize(shape)
        colour = _choose_colour(picture, raster, generator)
        picture.paste(_textured(raster.mask.size, colour, generator), (raster.x, raster.y), raster.mask)
    return picture


def rasterize(shape: Shape) -> RasterShape:
    """Draw a shape on the pixel grid, antialiased."""
    box = shape.box
    x, y = (int(value) for value in np.floor(box[:2]))
    columns, rows = (int(value) for value in np.ceil(box[2:]) - (x, y) + 1)
    fineness = 8 if max(columns, rows) <= 64 else 4
    fine = Image.new("L", (columns * fineness, rows * fineness))
    draw = ImageDraw.Draw(fine)
    for is_hole, ring in enumerate(shape.rings):
        points = (ring - (x, y)) * fineness  # Pillow fills every fine pixel that contains a corner
        draw.polygon(points.ravel().tolist(), fill=0 if is_hole else 255)
    covered = fine.getbbox()
    if covered is None:
        raise ValueError(f"a {shape.kind} of {box.tolist()} covers no pixel")
    return RasterShape(
        x=x, y=y, mask=fine.reduce(fineness), box=np.array(covered) / fineness + np.array([x, y, x, y])
    )


# Outlines of about 2 by 2, around (0, 0)


def _disc(_: np.random.Generator) -> Rings:
    return (_arc(0.0, _FULL_TURN),)


def _square(_: np.random.Generator) -> Rings:
    return (_points((-1, -1), (1, -1), (1, 1), (-1, 1)),)


def _triangle(_: np.random.Generator) -> Rings:
    return (_spokes(1.0, 1.0, 1.0),)


def _star(_: np.random.Generator) -> Rings:
    return (_spokes(*[1.0, 0.4] * 5),)


def _cross(_: np.random.Generator) -> Rings:
    a = 0.33
    corners = (
        (-a, -1),
        (a, -1),
        (a, -a),
        (1, -a),
        (1, a),
        (a, a),
        (a, 1),
        (-a, 1),
        (-a, a),
        (-1, a),
        (-1, -a),
    )
    return (_points(*corners, (-a, -a)),)


def _open_disc(generator: np.random.Generator) -> Rings:
    opening = generator.uniform(0.35, 0.7) * math.pi
    return (np.concatenate([_arc(opening / 2, _FULL_TURN - opening / 2), np.zeros((1, 2))]),)


def _notched_square(generator: np.random.Generator) -> Rings:
    half, depth = generator.uniform(0.35, 0.5), generator.uniform(-0.1, 0.3)
    return (_points((-1, -1), (-half, -1), (0, depth), (half, -1), (1, -1), (1, 1), (-1, 1)),)


def _cut_triangle(generator: np.random.Generator) -> Rings:
    tip = generator.uniform(0.4, 0.55)
    return (_points((-tip, -0.7), (tip, -0.7), (1, 0.7), (-1, 0.7)),)


def _hollow_star(_: np.random.Generator) -> Rings:
    return (_spokes(*[1.0, 0.45] * 5), _spokes(*[0.55, 0.25] * 5))


def _tee(_: np.random.Generator) -> Rings:
    a = 0.3
    return (_points((-1, -1), (1, -1), (1, -0.4), (a, -0.4), (a, 1), (-a, 1), (-a, -0.4), (-1, -0.4)),)


CLASSES: Mapping[str, Callable[[np.random.Generator], Rings]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}
"""The outlines of the classes; category ids count from 1 in this order."""

DISTRACTORS: Mapping[str, Callable[[np.random.Generator], Rings]] = {
    "open disc": _open_disc,
    "notched square": _notched_square,
    "cut triangle": _cut_triangle,
    "hollow star": _hollow_star,
    "tee": _tee,
}
"""The outlines of shapes that are easily mistaken for a class, one for each, in the order of `CLASSES`."""

_OUTLINES = {**CLASSES, **DISTRACTORS}
_CATEGORY_IDS = {kind: category_id for category_id, kind in enumerate(CLASSES, start=1)}


def _points(*points: tuple[float, float]) -> Float[np.ndarray, "n 2"]:
    return np.array(points, dtype=np.float64)


def _arc(start: float, stop: float) -> Float[np.ndarray, "n 2"]:
    angles = np.linspace(start, stop, 96)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _spokes(*lengths: float) -> Float[np.ndarray, "n 2"]:
    """Return points around the centre at these distances, the first one straight up."""
    angles = np.arange(len(lengths)) * (_FULL_TURN / len(lengths)) - math.pi / 2
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points: Float[np.ndarray, "n 2"] = directions * np.array(lengths)[:, None]
    return points


def _draw_sizes_and_kinds(
    kinds: Mapping[str, Any], count: int, spec: ShapesSpec, generator: np.random.Generator
) -> list[tuple[float, str]]:
    """Draw sizes, one from each equal part of the range of their logarithm, and a kind for each."""
    quantiles = (np.arange(count) + generator.random(count)) / max(count, 1)
    sizes = spec.min_size * (spec.max_size / spec.min_size) ** quantiles
    names = list(kinds)
    chosen = generator.integers(len(names), size=count).tolist()
    return list(zip(sizes.tolist(), [names[i] for i in chosen], strict=True))


def _rotate_and_scale(rings: Rings, *, size: float, generator: np.random.Generator) -> Rings:
    """Change the aspect of outlines, rotate them, and scale them to a size; their box starts at (0, 0)."""
    aspect = math.exp(generator.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
    turn = generator.uniform(0, _FULL_TURN)
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    rotated = [(ring * (math.sqrt(aspect), 1 / math.sqrt(aspect))) @ matrix.T for ring in rings]
    low, high = rotated[0].min(axis=0), rotated[0].max(axis=0)
    return tuple((ring - low) * (size / math.sqrt(np.prod(high - low))) for ring in rotated)


def _draw_corners(
    extent: Float[np.ndarray, " 2"], sides: Sides, generator: np.random.Generator
) -> Float[np.ndarray, "t 2"]:
    """Draw upper left corners for a box of this extent anywhere in an image, some of them over its border."""
    room = np.array(sides) - extent
    corners = generator.uniform(0, 1, size=(_NUM_TRIES, 2)) * room
    if generator.random() < _TRUNCATED_FRACTION:
        axis, is_far = generator.integers(2, size=2)
        overhang = generator.uniform(*_OVERHANG) * extent[axis]
        corners[:, axis] = room[axis] + overhang if is_far else -overhang
    return corners


def _choose_centre(
    sides: Sides, boxes: Float[np.ndarray, "m 4"], generator: np.random.Generator
) -> Float[np.ndarray, " 2"]:
    """Draw the centre of a group, where there is no other shape if possible."""
    extent = np.full(2, 3 * _GROUP_SPREAD)
    corners = generator.uniform(0, 1, size=(_NUM_TRIES, 2)) * np.maximum(np.array(sides) - extent, 0)
    corner = _first_free(corners, extent, boxes)
    centre: Float[np.ndarray, " 2"] = (corners[0] if corner is None else corner) + extent / 2
    return centre


def _draw_corners_in_group(
    extent: Float[np.ndarray, " 2"],
    sides: Sides,
    centre: Float[np.ndarray, " 2"],
    generator: np.random.Generator,
) -> Float[np.ndarray, "t 2"]:
    """Draw upper left corners for a box of this extent near the centre of a group, inside the image."""
    corners = generator.normal(centre - extent / 2, _GROUP_SPREAD, size=(_NUM_TRIES, 2))
    return np.clip(corners, 0.0, np.array(sides) - extent)


def _first_free(
    corners: Float[np.ndarray, "t 2"], extent: Float[np.ndarray, " 2"], boxes: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, " 2"] | None:
    """Return the first corner at which a box of this extent hardly overlaps the other boxes; None if there is none."""
    candidates = np.concatenate([corners, corners + extent], axis=1)
    smaller = np.minimum(np.prod(extent), area(boxes))  # (m,)
    is_free = (intersections(candidates, boxes) <= _MAX_OVERLAP * smaller).all(axis=1)
    return corners[np.argmax(is_free)] if is_free.any() else None


def _noise(columns: int, rows: int, generator: np.random.Generator) -> Float[np.ndarray, "rows columns"]:
    """Add up noise of several scales, from the whole image down to a few pixels."""
    field = np.zeros((rows, columns), dtype=np.float32)
    fade = generator.uniform(0.45, 0.75)
    for octave in range(2, 9):
        cells = 2**octave
        noise = generator.standard_normal((min(cells, rows), min(cells, columns)), dtype=np.float32)
        enlarged = Image.fromarray(noise).resize((columns, rows), Image.Resampling.BICUBIC)
        field += fade ** (octave - 2) * np.asarray(enlarged)
    return field


def _gradient_and_stripes(
    columns: int, rows: int, generator: np.random.Generator
) -> Float[np.ndarray, "rows columns"]:
    """Return a linear gradient and, in some images, smooth or hard stripes on top of it."""
    x = np.arange(columns, dtype=np.float32)[None, :]
    y = np.arange(rows, dtype=np.float32)[:, None]
    slope = generator.uniform(-2, 2, size=2).astype(np.float32)
    field: Float[np.ndarray, "rows columns"] = slope[0] * (x / columns) + slope[1] * (y / rows)
    if generator.random() < 0.4:
        turn, period = generator.uniform(0, math.pi), generator.uniform(6, 60)
        wave = np.sin((x * math.cos(turn) + y * math.sin(turn)) * np.float32(_FULL_TURN / period))
        field = field + generator.uniform(0.2, 0.7) * (np.sign(wave) if generator.random() < 0.5 else wave)
    return field


def _choose_colour(
    picture: Image.Image, raster: RasterShape, generator: np.random.Generator
) -> Float[np.ndarray, " 3"]:
    """Draw a colour much brighter or darker than the surroundings; the best of a few if none has enough contrast."""
    margin = 2 + max(raster.mask.size) // 8
    surroundings = picture.crop(
        (
            max(raster.x - margin, 0),
            max(raster.y - margin, 0),
            min(raster.x + raster.mask.width + margin, picture.width),
            min(raster.y + raster.mask.height + margin, picture.height),
        )
    )
    small = np.asarray(surroundings.resize((16, 16), Image.Resampling.BOX), dtype=np.float64) @ _LUMINANCE
    colours = generator.uniform(0, 255, size=(_NUM_COLOURS, 3))
    contrast = np.abs(colours @ _LUMINANCE - small.mean())
    is_enough = contrast >= _MIN_CONTRAST + small.std()
    best: Float[np.ndarray, " 3"] = colours[np.argmax(is_enough) if is_enough.any() else np.argmax(contrast)]
    return best


def _textured(
    size: tuple[int, int], colour: Float[np.ndarray, " 3"], generator: np.random.Generator
) -> Image.Image:
    """Return a patch of nearly one colour."""
    cells = int(generator.choice([2, 4, 8, 16]))
    cells = min(cells, max(size))
    shades = colour + generator.normal(0, generator.uniform(4, 14), size=(cells, cells, 1))
    shades = shades + generator.normal(0, 3, size=(cells, cells, 3))
    patch = Image.fromarray(np.clip(shades, 0, 255).astype(np.uint8))
    return patch.resize(size, Image.Resampling.BICUBIC)


def _to_annotation(shape: Shape, sides: Sides) -> dict[str, Any]:
    """Return category, box and area of the part of an object that lies inside the image."""
    raster = rasterize(shape)
    low, high = np.maximum(raster.box[:2], 0.0), np.minimum(raster.box[2:], sides)
    left, upper = max(-raster.x, 0), max(-raster.y, 0)
    right, lower = (
        min(raster.mask.width, sides.width - raster.x),
        min(raster.mask.height, sides.height - raster.y),
    )
    visible = np.asarray(raster.mask.crop((left, upper, right, lower)), dtype=np.float64)
    return {
        "category_id": _CATEGORY_IDS[shape.kind],
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": round(float(visible.sum() / 255), 2),
        "iscrowd": 0,
    }
