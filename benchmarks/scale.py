"""Measure what annotations take to load, to cover with chips and to order, at several numbers of images.

    python benchmarks/scale.py --annotations coco_val2017.json --images 5000 118287 1000000

The annotations are repeated, under other ids and names, until there are as many images; each number is measured in a
process of its own. Seconds are of the processor; memory is resident, with the modules.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

from device import markdown

COLUMNS = (
    "images",
    "boxes",
    "JSON, MB",
    "load, s",
    "at most, GB",
    "loaded, GB",
    "cover, s",
    "order, s",
    "chips",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure what annotations take at several numbers of images."
    )
    parser.add_argument("--annotations", type=Path, required=True, help="COCO JSON file")
    parser.add_argument("--images", type=int, nargs="+", default=[5_000, 118_287, 1_000_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in options.images:
            path = Path(folder) / f"{count}.json"
            repeat(options.annotations, path, num_images=count)
            command = [sys.executable, __file__, "--annotations", str(path), "--measure", str(path)]
            rows.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            )
            path.unlink()
    print(markdown(COLUMNS, rows))


def repeat(source: Path, target: Path, *, num_images: int) -> None:
    """Write annotations with some number of images, without holding them in memory."""
    content = json.loads(source.read_text())
    boxes: dict[int, list[str]] = {}
    for entry in content["annotations"]:
        kept = {key: entry[key] for key in ("category_id", "bbox", "area", "iscrowd")}
        boxes.setdefault(entry["image_id"], []).append(json.dumps(kept)[1:])
    images = content["images"]
    categories = [{"id": each["id"], "name": each["name"]} for each in content["categories"]]
    with target.open("w") as file:
        file.write(f'{{"categories": {json.dumps(categories)}, "images": [')
        for number in range(num_images):
            image = images[number % len(images)]
            entry = {"id": number + 1, "file_name": f"{number + 1:012d}.jpg"}
            entry |= {"width": image["width"], "height": image["height"]}
            file.write(f"{', ' if number else ''}{json.dumps(entry)}")
        file.write('], "annotations": [')
        separator, annotation_id = "", 0
        for number in range(num_images):
            for text in boxes.get(images[number % len(images)]["id"], []):
                annotation_id += 1
                file.write(f'{separator}{{"id": {annotation_id}, "image_id": {number + 1}, {text}')
                separator = ", "
        file.write("]}")


def measure(path: Path) -> list[str]:
    import numpy as np

    from sniper.chips import PyramidSpec
    from sniper.data.datasets import load_dataset
    from sniper.data.epoch import choose_positive_chips, order_chips

    pyramid = PyramidSpec()
    started = time.process_time()
    dataset = load_dataset(path, has_images=False)
    loaded = time.process_time() - started
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    first = dataset.select(np.arange(min(len(dataset), 10)))
    choose_positive_chips(first, pyramid, generator=np.random.default_rng(0))  # loads the kernels
    started = time.process_time()
    table = choose_positive_chips(dataset, pyramid, generator=np.random.default_rng(0))
    covered = time.process_time() - started
    started = time.process_time()
    order_chips(dataset, pyramid, batch_size=128, flip=0.5, seed=0, epoch=0, images_at_once=None)
    ordered = time.process_time() - started
    return [
        f"{len(dataset):,}",
        f"{len(dataset.boxes):,}",
        f"{path.stat().st_size / 1e6:.0f}",
        f"{loaded:.2f}",
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f}",
        f"{resident / 1e9:.2f}",
        f"{covered:.2f}",
        f"{ordered:.2f}",
        f"{len(table):,}",
    ]


if __name__ == "__main__":
    main()
