"""The made-up world: objects of all sizes, drawn by code.

Five classes are told apart by shape alone; colour, texture, size and turn say nothing. Between them lies clutter:
figures that resemble an object and are none. So a detector has to look closely at every scale, and has something to
be wrong about.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageChops, ImageDraw

from sniper.geometry.boxes import intersections

_LARGEST_TURN = 2 * math.pi
_ASPECTS = (0.7, 1.4)  # width to height, before turning
_BORDER_SHARE = 0.04  # of figures reach over the border of the image
_BORDER_OVERHANG = (0.1, 0.4)  # share of their width or height that is outside
_MOST_SHARED = 0.04  # of the smaller box, with any other box
_NUM_TRIES = 200  # places looked at before a figure is left out
_NUM_COLOURS = 24  # drawn before the one of most contrast is taken
_LEAST_CONTRAST = 60.0  # grey levels between a figure and what surrounds it
_LUMINANCE = np.array([0.299, 0.587, 0.114])
_QUALITY = 95
_BACKGROUND_REDUCTION = 4  # the background is painted this much smaller, then enlarged
_GRAIN = 3  # grey levels, up and down

Rings = tuple[Float[np.ndarray, "_ 2"], ...]
"""Closed outlines, y down: the first is filled, the others are holes in it."""


@dataclass(frozen=True, kw_only=True)
class ShapesSpec:
    """What the made-up world is like.

    Attributes:
        num_images: how many.
        shortest_side: of an image, pixels.
        longest_side: of an image, pixels. Sides are spread evenly between the two.
        fewest_objects: in an image.
        most_objects: in an image.
        fewest_clutter: figures in an image that are no object.
        most_clutter: figures in an image that are no object.
        smallest: size of an object, pixels (square root of the area of its box).
        largest: size of an object, pixels. Sizes are spread evenly between the two in their logarithm.
    """

    num_images: int = 40
    shortest_side: int = 1000
    longest_side: int = 2000
    fewest_objects: int = 8
    most_objects: int = 24
    fewest_clutter: int = 4
    most_clutter: int = 12
    smallest: float = 8.0
    largest: float = 400.0

    def __post_init__(self) -> None:
        if self.num_images < 0:
            raise ValueError(f"num_images must not be negative, not {self.num_images}")
        if not 0 < self.shortest_side <= self.longest_side:
            raise ValueError(
                f"wanted 0 < shortest_side <= longest_side, got {self.shortest_side}, {self.longest_side}"
            )
        if not 0 <= self.fewest_objects <= self.most_objects:
            raise ValueError(
                f"wanted 0 <= fewest_objects <= most_objects, got {self.fewest_objects}, {self.most_objects}"
            )
        if not 0 <= self.fewest_clutter <= self.most_clutter:
            raise ValueError(
                f"wanted 0 <= fewest_clutter <= most_clutter, got {self.fewest_clutter}, {self.most_clutter}"
            )
        if not 0 < self.smallest <= self.largest <= self.shortest_side / 2:
            raise ValueError(
                f"wanted 0 < smallest <= largest <= shortest_side / 2, got {self.smallest}, {self.largest} "
                f"and {self.shortest_side}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Figure:
    """Something to be drawn.

    Attributes:
        kind: a key of `CLASSES` or of `CLUTTER`.
        rings: its outlines, image frame.
    """

    kind: str
    rings: Rings

    @property
    def box(self) -> Float[np.ndarray, " 4"]:
        """The tight box, xyxy, image frame; it may reach over the border of the image."""
        return np.concatenate([self.rings[0].min(axis=0), self.rings[0].max(axis=0)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Ink:
    """A figure on the pixel grid.

    Attributes:
        x: of its left column of pixels, image frame.
        y: of its upper row of pixels, image frame.
        mask: share of each pixel that it covers, 0 to 255.
        box: (4,) tight xyxy around what is covered, image frame, as fine as an eighth or a quarter of a pixel.
    """

    x: int
    y: int
    mask: Image.Image
    box: Float[np.ndarray, " 4"]


def draw_shapes(folder: Path, *, spec: ShapesSpec, seed: int, name: str = "train") -> Path:
    """Draw a data set: `images/NAME_000.jpg` and so on, and `NAME.json` with the objects as COCO.

    Args:
        folder: where to write; made if it is not there.
        spec: what the world is like.
        seed: equal seeds give equal bytes.
        name: of this part of the world.

    Returns:
        The path of the JSON file.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    digits = max(3, len(str(spec.num_images - 1)))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(spec.num_images):
        generator = np.random.default_rng([seed, index])
        width, height = generator.integers(spec.shortest_side, spec.longest_side + 1, size=2).tolist()
        figures = lay_out(spec, width=width, height=height, generator=generator)
        picture = paint(paint_background(width, height, generator=generator), figures, generator=generator)
        file_name = f"{name}_{index:0{digits}d}.jpg"
        picture.save(folder / "images" / file_name, quality=_QUALITY)
        images.append({"id": index + 1, "file_name": file_name, "width": width, "height": height})
        for figure in figures:
            if figure.kind in CLASSES:
                entry = {"id": len(annotations) + 1, "image_id": index + 1}
                annotations.append(entry | _as_coco(figure, width=width, height=height))
    categories = [{"id": category_id, "name": kind} for kind, category_id in _CATEGORY_IDS.items()]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def lay_out(
    spec: ShapesSpec, *, width: int, height: int, generator: np.random.Generator
) -> tuple[Figure, ...]:
    """Choose what an image shows, and where, the largest first; what finds no room is left out.

    Args:
        spec: how many figures, and their sizes.
        width: of the image, pixels.
        height: of the image, pixels.
        generator: draws everything.
    """
    num_objects = int(generator.integers(spec.fewest_objects, spec.most_objects + 1))
    num_clutter = int(generator.integers(spec.fewest_clutter, spec.most_clutter + 1))
    wanted = _choose(CLASSES, num_objects, spec, generator) + _choose(CLUTTER, num_clutter, spec, generator)
    figures: list[Figure] = []
    boxes = np.zeros((0, 4))
    for size, kind in sorted(wanted, reverse=True):
        rings = _turn_and_stretch(_KINDS[kind](generator), size=size, generator=generator)
        corner = _find_room(rings[0].max(axis=0), (width, height), boxes, generator)
        if corner is not None:
            figures.append(Figure(kind=kind, rings=tuple(ring + corner for ring in rings)))
            boxes = np.concatenate([boxes, figures[-1].box[None]])
    return tuple(figures)


def paint_background(width: int, height: int, *, generator: np.random.Generator) -> Image.Image:
    """Paint an image of nothing: clouds, a slope, sometimes stripes, in a few colours, with a fine grain.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        generator: draws everything.
    """
    columns, rows = -(-width // _BACKGROUND_REDUCTION), -(-height // _BACKGROUND_REDUCTION)
    field = _clouds(columns, rows, generator) + _slope_and_stripes(
        columns, rows, generator
    )  # (rows, columns)
    field = (field - field.min()) / (np.ptp(field) + 1e-9)
    palette = np.clip(generator.uniform(40, 215, size=3) + generator.normal(0, 28, size=(4, 3)), 0, 255)
    stops = np.linspace(0, 1, len(palette))
    table = np.stack([np.interp(np.linspace(0, 1, 256), stops, palette[:, i]) for i in range(3)], axis=1)
    colours = table.astype(np.uint8)[(field * 255).astype(np.uint8)]  # (rows, columns, 3)
    smooth = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    grain = Image.fromarray(generator.integers(0, 2 * _GRAIN + 1, size=(height, width), dtype=np.uint8))
    return ImageChops.add(smooth, Image.merge("RGB", (grain, grain, grain)), offset=-_GRAIN)


def paint(
    background: Image.Image, figures: Sequence[Figure], *, generator: np.random.Generator
) -> Image.Image:
    """Paint figures on a copy of a background, each in a colour that stands out where it lies.

    Args:
        background: RGB.
        figures: in the background's frame, the lowest first.
        generator: draws colours and textures.
    """
    picture = background.copy()
    for figure in figures:
        ink = to_ink(figure)
        colour = _choose_colour(picture, ink, generator)
        picture.paste(_textured(ink.mask.size, colour, generator), (ink.x, ink.y), ink.mask)
    return picture


def to_ink(figure: Figure) -> Ink:
    """Put a figure on the pixel grid, antialiased."""
    box = figure.box
    x, y = (int(value) for value in np.floor(box[:2]))
    columns, rows = (int(value) for value in np.ceil(box[2:]) - (x, y) + 1)
    fineness = 8 if max(columns, rows) <= 64 else 4
    fine = Image.new("L", (columns * fineness, rows * fineness))
    draw = ImageDraw.Draw(fine)
    for is_hole, ring in enumerate(figure.rings):
        points = (ring - (x, y)) * fineness  # Pillow fills every fine pixel that a corner lies in
        draw.polygon(points.ravel().tolist(), fill=0 if is_hole else 255)
    covered = fine.getbbox()
    if covered is None:
        raise ValueError(f"a {figure.kind} of {box.tolist()} covers no pixel")
    return Ink(
        x=x, y=y, mask=fine.reduce(fineness), box=np.array(covered) / fineness + np.array([x, y, x, y])
    )


# Outlines of about 2 by 2, around (0, 0)


def _disc(_: np.random.Generator) -> Rings:
    return (_arc(0.0, _LARGEST_TURN),)


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


def _ring(generator: np.random.Generator) -> Rings:
    return (_arc(0.0, _LARGEST_TURN), _arc(0.0, _LARGEST_TURN) * generator.uniform(0.5, 0.65))


def _hollow_square(generator: np.random.Generator) -> Rings:
    (outer,) = _square(generator)
    return (outer, outer * generator.uniform(0.5, 0.65))


def _hollow_star(_: np.random.Generator) -> Rings:
    return (_spokes(*[1.0, 0.45] * 5), _spokes(*[0.55, 0.25] * 5))


def _hollow_triangle(generator: np.random.Generator) -> Rings:
    (outer,) = _triangle(generator)
    return (outer, outer * generator.uniform(0.42, 0.55))


def _open_disc(generator: np.random.Generator) -> Rings:
    opening = generator.uniform(0.35, 0.7) * math.pi
    return (np.concatenate([_arc(opening / 2, _LARGEST_TURN - opening / 2), np.zeros((1, 2))]),)


def _half_disc(_: np.random.Generator) -> Rings:
    return (_arc(0.0, math.pi),)


def _notched_square(generator: np.random.Generator) -> Rings:
    half, depth = generator.uniform(0.35, 0.5), generator.uniform(-0.1, 0.3)
    return (_points((-1, -1), (-half, -1), (0, depth), (half, -1), (1, -1), (1, 1), (-1, 1)),)


def _cut_triangle(generator: np.random.Generator) -> Rings:
    tip = generator.uniform(0.4, 0.55)
    return (_points((-tip, -0.7), (tip, -0.7), (1, 0.7), (-1, 0.7)),)


def _angle(_: np.random.Generator) -> Rings:
    return (_points((-1, -1), (-0.35, -1), (-0.35, 0.35), (1, 0.35), (1, 1), (-1, 1)),)


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
"""What is to be found: name to outline. Category ids count them from 1."""

CLUTTER: Mapping[str, Callable[[np.random.Generator], Rings]] = {
    "ring": _ring,
    "hollow square": _hollow_square,
    "hollow triangle": _hollow_triangle,
    "hollow star": _hollow_star,
    "open disc": _open_disc,
    "half disc": _half_disc,
    "notched square": _notched_square,
    "cut triangle": _cut_triangle,
    "angle": _angle,
    "tee": _tee,
}
"""What only looks like it: name to outline."""

_KINDS = {**CLASSES, **CLUTTER}
_CATEGORY_IDS = {kind: number for number, kind in enumerate(CLASSES, start=1)}


def _points(*points: tuple[float, float]) -> Float[np.ndarray, "n 2"]:
    return np.array(points, dtype=np.float64)


def _arc(start: float, stop: float) -> Float[np.ndarray, "n 2"]:
    angles = np.linspace(start, stop, 96)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _spokes(*lengths: float) -> Float[np.ndarray, "n 2"]:
    """Give points around the centre at these distances, the first one up."""
    angles = np.arange(len(lengths)) * (_LARGEST_TURN / len(lengths)) - math.pi / 2
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points: Float[np.ndarray, "n 2"] = directions * np.array(lengths)[:, None]
    return points


def _choose(
    kinds: Mapping[str, Any], count: int, spec: ShapesSpec, generator: np.random.Generator
) -> list[tuple[float, str]]:
    """Draw sizes, one from each equal part of the range of their logarithm, and a kind for each."""
    shares = (np.arange(count) + generator.random(count)) / max(count, 1)
    sizes = spec.smallest * (spec.largest / spec.smallest) ** shares
    names = list(kinds)
    chosen = generator.integers(len(names), size=count).tolist()
    return list(zip(sizes.tolist(), [names[i] for i in chosen], strict=True))


def _turn_and_stretch(rings: Rings, *, size: float, generator: np.random.Generator) -> Rings:
    """Give outlines another aspect and turn, and the size wanted; their box starts at (0, 0)."""
    aspect = math.exp(generator.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
    turn = generator.uniform(0, _LARGEST_TURN)
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    turned = [(ring * (math.sqrt(aspect), 1 / math.sqrt(aspect))) @ matrix.T for ring in rings]
    low, high = turned[0].min(axis=0), turned[0].max(axis=0)
    return tuple((ring - low) * (size / math.sqrt(np.prod(high - low))) for ring in turned)


def _find_room(
    extent: Float[np.ndarray, " 2"],
    frame: tuple[int, int],
    taken: Float[np.ndarray, "m 4"],
    generator: np.random.Generator,
) -> Float[np.ndarray, " 2"] | None:
    """Find a corner where a box of this extent shares next to nothing with those that are there."""
    room = np.array(frame) - extent
    corners = generator.uniform(0, 1, size=(_NUM_TRIES, 2)) * room
    if generator.random() < _BORDER_SHARE:
        axis, is_far = generator.integers(2, size=2)
        overhang = generator.uniform(*_BORDER_OVERHANG) * extent[axis]
        corners[:, axis] = room[axis] + overhang if is_far else -overhang
    boxes = np.concatenate([corners, corners + extent], axis=1)
    smaller = np.minimum(np.prod(extent), np.prod(taken[:, 2:] - taken[:, :2], axis=1))  # (m,)
    is_free = (intersections(boxes, taken) <= _MOST_SHARED * smaller).all(axis=1)
    return corners[np.argmax(is_free)] if is_free.any() else None


def _clouds(columns: int, rows: int, generator: np.random.Generator) -> Float[np.ndarray, "rows columns"]:
    """Add noise of many grains, from the whole image down to a few pixels."""
    field = np.zeros((rows, columns), dtype=np.float32)
    fade = generator.uniform(0.45, 0.75)
    for octave in range(2, 9):
        cells = 2**octave
        noise = generator.standard_normal((min(cells, rows), min(cells, columns)), dtype=np.float32)
        cloud = Image.fromarray(noise).resize((columns, rows), Image.Resampling.BICUBIC)
        field += fade ** (octave - 2) * np.asarray(cloud)
    return field


def _slope_and_stripes(
    columns: int, rows: int, generator: np.random.Generator
) -> Float[np.ndarray, "rows columns"]:
    """Give a slope across the image, and in some images stripes, soft or hard, on top of it."""
    x = np.arange(columns, dtype=np.float32)[None, :]
    y = np.arange(rows, dtype=np.float32)[:, None]
    slope = generator.uniform(-2, 2, size=2).astype(np.float32)
    field: Float[np.ndarray, "rows columns"] = slope[0] * (x / columns) + slope[1] * (y / rows)
    if generator.random() < 0.4:
        turn, period = generator.uniform(0, math.pi), generator.uniform(6, 60)
        wave = np.sin((x * math.cos(turn) + y * math.sin(turn)) * np.float32(_LARGEST_TURN / period))
        field = field + generator.uniform(0.2, 0.7) * (np.sign(wave) if generator.random() < 0.5 else wave)
    return field


def _choose_colour(picture: Image.Image, ink: Ink, generator: np.random.Generator) -> Float[np.ndarray, " 3"]:
    """Draw a colour that is much brighter or darker than what lies around; the best of a few if none is."""
    margin = 2 + max(ink.mask.size) // 8
    around = picture.crop(
        (
            max(ink.x - margin, 0),
            max(ink.y - margin, 0),
            min(ink.x + ink.mask.width + margin, picture.width),
            min(ink.y + ink.mask.height + margin, picture.height),
        )
    )
    small = np.asarray(around.resize((16, 16), Image.Resampling.BOX), dtype=np.float64) @ _LUMINANCE
    colours = generator.uniform(0, 255, size=(_NUM_COLOURS, 3))
    contrast = np.abs(colours @ _LUMINANCE - small.mean())
    is_enough = contrast >= _LEAST_CONTRAST + small.std()
    best: Float[np.ndarray, " 3"] = colours[np.argmax(is_enough) if is_enough.any() else np.argmax(contrast)]
    return best


def _textured(
    size: tuple[int, int], colour: Float[np.ndarray, " 3"], generator: np.random.Generator
) -> Image.Image:
    """Give a patch of nearly one colour."""
    cells = int(generator.choice([2, 4, 8, 16]))
    cells = min(cells, max(size))
    shades = colour + generator.normal(0, generator.uniform(4, 14), size=(cells, cells, 1))
    shades = shades + generator.normal(0, 3, size=(cells, cells, 3))
    patch = Image.fromarray(np.clip(shades, 0, 255).astype(np.uint8))
    return patch.resize(size, Image.Resampling.BICUBIC)


def _as_coco(figure: Figure, *, width: int, height: int) -> dict[str, Any]:
    """Give category, box and area of what an image of this size shows of an object."""
    ink = to_ink(figure)
    low, high = np.maximum(ink.box[:2], 0.0), np.minimum(ink.box[2:], (width, height))
    left, upper = max(-ink.x, 0), max(-ink.y, 0)
    right, lower = min(ink.mask.width, width - ink.x), min(ink.mask.height, height - ink.y)
    shown = np.asarray(ink.mask.crop((left, upper, right, lower)), dtype=np.float64)
    return {
        "category_id": _CATEGORY_IDS[figure.kind],
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": round(float(shown.sum() / 255), 2),
        "iscrowd": 0,
    }
