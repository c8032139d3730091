"""Measure how annotations of the size of COCO's training set are read: CPU time and peak memory of several readers.

    python benchmarks/annotations.py /tmp/annotations

Writes a file of 118,287 images and 870,248 boxes with polygons of 44 numbers into the folder, unless it is there. Each
reader runs in its own process, in turn, several times; one JSON line each has the lowest CPU time after imports, the
peak memory of the process, and the ratio of both to `load_dataset`, which checks what it reads; `sniper` reads boxes
alone, `sniper_masks` their polygons, too.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sniper.files import atomic_write

NUM_IMAGES, NUM_BOXES, NUM_CATEGORIES = 118_287, 870_248, 80
READERS = ("sniper", "sniper_masks", "msgspec", "hotcoco", "pycocotools", "json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="for the file, outside the repository")
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--boxes", type=int, default=NUM_BOXES)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=READERS, help="read the file once, in this process")
    options = parser.parse_args()
    path: Path = options.folder / f"{options.images}_{options.boxes}.json"
    if options.measure:
        print(json.dumps(measure(options.measure, path)))
        return
    if not path.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        write_annotations(path, num_images=options.images, num_boxes=options.boxes)
    runs: dict[str, list[tuple[float, float]]] = {reader: [] for reader in options.readers}
    for _ in range(options.repeats):
        for reader in options.readers:
            command = [sys.executable, __file__, options.folder, "--measure", reader]
            command += ["--images", options.images, "--boxes", options.boxes]
            done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
            runs[reader].append(tuple(json.loads(done.stdout.splitlines()[-1])))
    best = {
        reader: (min(run[0] for run in runs[reader]), max(run[1] for run in runs[reader])) for reader in runs
    }
    first = best[options.readers[0]]
    for reader, (seconds, gigabytes) in best.items():
        result = {
            "benchmark": "annotations",
            "reader": reader,
            "megabytes": round(path.stat().st_size / 1e6),
            "cpu_seconds": round(seconds, 2),
            "peak_gigabytes": round(gigabytes, 2),
            "time_ratio": round(seconds / first[0], 2),
            "memory_ratio": round(gigabytes / first[1], 2),
        }
        print(json.dumps(result), flush=True)


def measure(reader: str, path: Path) -> tuple[float, float]:
    """Read a file; return the CPU seconds, imports excluded, and the peak memory of the process in gigabytes."""
    read = choose_reader(reader)
    started = time.process_time()
    content = read(path)
    seconds = time.process_time() - started
    del content
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def choose_reader(name: str) -> Callable[[Path], object]:
    """Import what a reader needs, and nothing else."""
    if name in ("sniper", "sniper_masks"):
        from sniper.data.datasets import load_dataset
        from sniper.data.spec import DataSpec

        data = DataSpec(masks="read" if name == "sniper_masks" else "ignore")
        return lambda path: load_dataset(path, has_images=False, data=data)
    if name == "hotcoco":
        import hotcoco

        return lambda path: hotcoco.COCO(str(path))
    if name == "pycocotools":
        from pycocotools.coco import COCO

        return lambda path: COCO(str(path))
    if name == "msgspec":
        import msgspec

        return lambda path: msgspec.json.decode(path.read_bytes())
    return lambda path: json.loads(path.read_bytes())


def write_annotations(path: Path, *, num_images: int, num_boxes: int) -> None:
    """Write a COCO file of random boxes and polygons, with the keys that COCO's own files have; the seed is fixed."""
    generator = np.random.default_rng(0)
    ids = generator.permutation(5 * num_images)[:num_images].tolist()
    polygons = [
        ", ".join(f"{number:.2f}" for number in polygon)
        for polygon in generator.uniform(0, 640, (2000, 44)).tolist()
    ]
    image_ids = generator.choice(ids, num_boxes).tolist()
    category_ids = generator.integers(1, NUM_CATEGORIES + 1, num_boxes).tolist()
    shapes = generator.integers(0, len(polygons), num_boxes).tolist()
    boxes = generator.uniform([0, 0, 2, 2], [500, 400, 140, 80], (num_boxes, 4)).round(2).tolist()
    with atomic_write(path) as file:
        file.write(b'{"info": {"description": "random"}, "images": [')
        for index, image_id in enumerate(ids):
            image = {
                "license": 3,
                "file_name": f"{image_id:012d}.jpg",
                "coco_url": f"http://images.cocodataset.org/train2017/{image_id:012d}.jpg",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 16:28:13",
                "id": image_id,
            }
            file.write(b", " * (index > 0) + json.dumps(image).encode())
        file.write(b'], "annotations": [')
        for index, (box, shape) in enumerate(zip(boxes, shapes, strict=True)):
            annotation = (
                f'{{"segmentation": [[{polygons[shape]}]], "area": {0.7 * box[2] * box[3]:.4f}, '
                f'"iscrowd": {int(index % 90 == 0)}, "image_id": {image_ids[index]}, "bbox": {box}, '
                f'"category_id": {category_ids[index]}, "id": {900_000 + index}}}'
            )
            file.write(b", " * (index > 0) + annotation.encode())
        categories = [
            {"supercategory": "any", "id": number, "name": f"class {number}"}
            for number in range(1, NUM_CATEGORIES + 1)
        ]
        file.write(f'], "categories": {json.dumps(categories)}}}'.encode())


if __name__ == "__main__":
    main()
