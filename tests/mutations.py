"""Damaged annotation files and images: seeded mutations, and a process that reads them one by one.

    python -m tests.mutations annotations|images INTACT FILE...

reads files, and prints one line for each: its name, and `read` or the error. Anything but an error of ours ends the
process with a traceback, a file that takes more than five seconds ends it by a signal.
"""

import io
import json
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SECONDS = 5
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, -0.0, 2**31, 2**63, -(2**63), 10**400, 1e308, -1e308),
    *(float("nan"), float("inf"), "", "1", "640", "-7", "x" * 1000, "é\u0000\ud800", "../../x", "\x1b[31m"),
    *([], [1], [1, 2, 3, 4], [[]], {}, {"id": 1}),
)


def mutate_json(content: Any, generator: np.random.Generator) -> bytes:
    """Change one to three values of a JSON document: replace, remove, repeat or exchange them."""
    content = json.loads(json.dumps(content))
    for _ in range(int(generator.integers(1, 4))):
        containers = list(_containers(content))
        container = containers[int(generator.integers(len(containers)))]
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            continue
        key = keys[int(generator.integers(len(keys)))]
        action = int(generator.integers(4))
        if action == 0:
            container[key] = _VALUES[int(generator.integers(len(_VALUES)))]
        elif action == 1:
            del container[key]
        elif action == 2 and isinstance(container, list):
            container.append(container[key])
        else:
            other = keys[int(generator.integers(len(keys)))]
            container[key], container[other] = container[other], container[key]
    return json.dumps(content).encode()


def mutate_bytes(intact: bytes, generator: np.random.Generator) -> bytes:
    """Cut, repeat, insert, flip or overwrite bytes, most often near the start, where the headers are."""
    content = bytearray(intact)
    for _ in range(int(generator.integers(1, 4))):
        end = len(content) if generator.random() < 0.5 else min(len(content), 64)
        at = int(generator.integers(max(end, 1)))
        count = int(generator.integers(1, 9))
        action = int(generator.integers(5))
        if action == 0:
            del content[at:]
        elif action == 1:
            content[at:at] = content[at : at + count]
        elif action == 2:
            content[at:at] = generator.bytes(count)
        elif action == 3 and content:
            content[min(at, len(content) - 1)] ^= 1 << int(generator.integers(8))
        else:
            content[at : at + count] = bytes([int(generator.choice([0, 255]))]) * count
    return bytes(content)


def encode_image(format_name: str, generator: np.random.Generator) -> bytes:
    """Encode a small image of smooth noise."""
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((64, 48)).save(file, format=format_name)
    return file.getvalue()


def _containers(content: Any) -> list[Any]:
    """List all non-empty lists and objects of a JSON document."""
    if not isinstance(content, dict | list) or not content:
        return []
    values = content.values() if isinstance(content, dict) else content
    return [content, *(inner for value in values for inner in _containers(value))]


def read_annotations(path: Path) -> None:
    """Read a data set as the commands do: with its images, and for scoring."""
    from sniper.data.datasets import load_dataset
    from sniper.evaluation.coco import evaluate

    evaluate([], load_dataset(path, has_images=False).to_coco())
    load_dataset(path)


def read_image(path: Path) -> None:
    """Read an image: its sides, and all of its pixels."""
    from sniper.data.images.files import open_image

    image = open_image(path)
    image.read((0, 0, image.width, image.height))


def read_all(paths: Sequence[Path], read: Callable[[Path], None]) -> None:
    """Read files one by one, each within the time limit; print one line for each, and the peak memory in kB."""
    from sniper.errors import SniperError

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    for path in paths:
        show(f"{path.name} ")
        signal.alarm(SECONDS)
        try:
            read(path)
            show("read\n")
        except SniperError as error:
            show(f"{str(error)!r}\n")
        signal.alarm(0)
    show(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\n")


if __name__ == "__main__":
    reader = {"annotations": read_annotations, "images": read_image}[sys.argv[1]]
    first, *others = map(Path, sys.argv[2:])
    reader(first)  # an intact file: imports and the compilation of kernels do not count
    read_all(others, reader)
