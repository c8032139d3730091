"""Measure how masks are read: time and memory of `load_dataset` and of pycocotools, and what the masks take.

    python benchmarks/masks.py nuclei/train.json coco_masks/train.json

Each reader runs in its own process, in turn, several times. One JSON line for each file has the lowest CPU time after
imports, the most memory that reading added to the peak of the process (0 for small files), the ratios of pycocotools to
`load_dataset`, and the bytes of the arrays of masks as a share of those of the segmentations in the file.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

READERS = ("sniper", "pycocotools")


class _Annotation(msgspec.Struct):
    segmentation: msgspec.Raw = msgspec.Raw(b"")


class _File(msgspec.Struct):
    annotations: list[_Annotation]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", type=Path, nargs="+", help="COCO JSON with masks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", choices=READERS, help="read the first file once, in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.files[0])))
        return
    for path in options.files:
        best = {reader: read_repeatedly(reader, path, repeats=options.repeats) for reader in READERS}
        (seconds, megabytes), (their_seconds, their_megabytes) = (best[reader] for reader in READERS)
        result = {
            "benchmark": "masks",
            "file": "/".join(path.parts[-2:]),
            "cpu_seconds": round(seconds, 3),
            "megabytes": round(megabytes, 1),
            "pycocotools_cpu_seconds": round(their_seconds, 3),
            "pycocotools_megabytes": round(their_megabytes, 1),
            "time_ratio": round(their_seconds / seconds, 2),
            "memory_ratio": round(their_megabytes / megabytes, 2) if megabytes else None,
            **measure_masks(path),
        }
        print(json.dumps(result), flush=True)


def read_repeatedly(reader: str, path: Path, *, repeats: int) -> tuple[float, float]:
    """Return the lowest CPU time and the most memory of several processes."""
    runs = []
    for _ in range(repeats):
        command = [sys.executable, __file__, str(path), "--measure", reader]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return min(run[0] for run in runs), max(run[1] for run in runs)


def measure(reader: str, path: Path) -> tuple[float, float]:
    """Read a file; return the CPU seconds and the megabytes that the process grew by, both without imports."""
    read = choose_reader(reader)
    before, started = peak_megabytes(), time.process_time()
    content = read(path)
    seconds, grown = time.process_time() - started, peak_megabytes() - before
    del content
    return seconds, grown


def peak_megabytes() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def choose_reader(name: str) -> Callable[[Path], object]:
    """Import what a reader needs, and nothing else; load compiled kernels."""
    if name == "sniper":
        import numpy as np

        from sniper.data.datasets import load_dataset
        from sniper.geometry.masks import MaskArrays, encode_counts

        codes, offsets = encode_counts(np.array([1, 2]), np.array([0, 2]))
        MaskArrays.from_codes(codes, offsets, np.array([[1, 3]])).measure()
        return lambda path: load_dataset(path, has_images=False)
    from pycocotools.coco import COCO

    return lambda path: COCO(str(path))


def measure_masks(path: Path) -> dict[str, float]:
    """Return the number of masks, their bytes in memory, and these as a share of the bytes in the file."""
    from sniper.data.datasets import load_dataset

    masks = load_dataset(path, has_images=False).masks
    if masks is None:
        raise SystemExit(f"{path}: has no masks")
    texts = msgspec.json.decode(path.read_bytes(), type=_File).annotations
    num_bytes = sum(len(bytes(annotation.segmentation)) for annotation in texts)
    return {
        "num_masks": int(masks.has_mask.sum()),
        "mask_megabytes": round(masks.nbytes / 1e6, 2),
        "share_of_file": round(masks.nbytes / num_bytes, 2),
    }


if __name__ == "__main__":
    main()
