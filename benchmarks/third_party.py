"""Train a detector of another package on chips, and on grid tiles of equal pixels, and score both on whole images.

Chips and tiles are written by `sniper chips --to yolo`. LibreYOLO (MIT, `pip install libreyolo`) trains its YOLOX on
them from random weights, without mosaic and rotation, which would change the scale of objects, and detects objects in
the windows of `sniper chips --search`. `sniper merge` brings the detections back to the images, and `sniper evaluate`
scores them. Run it in an environment of its own that has both packages. Finished steps are kept in the folder and not
repeated.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ARMS = ("chips", "tiles")


def main() -> None:
    """Run both arms for every seed, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for chips, runs and results")
    parser.add_argument("--data", type=Path, nargs=2, required=True, metavar=("TRAIN", "TEST"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--epochs", type=int, default=3, help="passes over the chips; tiles are trained on once"
    )
    parser.add_argument("--chip-size", type=int, default=256)
    parser.add_argument("--window", type=int, default=512, help="longest side of a window of the search")
    parser.add_argument("--size", default="n", help="of YOLOX: n, t, s, ...")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    results = [run_arm(arm, seed, arguments) for seed in arguments.seeds for arm in ARMS]
    print(json.dumps({"data": [path.parent.name for path in arguments.data], "results": results}, indent=1))


def run_arm(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on the chips or on tiles, and score on whole images; return the result of before if there is one."""
    folder: Path = arguments.folder / f"{arm}_{seed}"
    kept = folder / "result.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    train_set, test_set = arguments.data
    side = arguments.chip_size
    images = folder / "dataset"  # not images: labels are looked for by that part of a path
    scale = {
        "chips": ["--pyramid.chip_size", side, "--dose", 0.1],
        "tiles": ["--data.tiles.side", side],
    }[arm]
    sniper("chips", train_set, "--to", "yolo", images, *scale, "--val", test_set, "--seed", seed)
    searched = folder / "search"
    window = ["--predict.window", arguments.window]
    config = images / "experiment.yaml"
    sniper("chips", test_set, "--to", "yolo", searched, "--search", "--config", config, *window)
    num_views = arguments.epochs * count_images(arguments.folder / f"chips_{seed}" / "dataset")
    data, num_epochs = write_list(images, num_views=num_views, folder=folder, seed=seed)
    started = time.monotonic()
    weights = train(data, num_epochs=num_epochs, folder=folder, seed=seed, arguments=arguments)
    trained = time.monotonic() - started
    found = folder / "found_on_windows.json"
    detect(weights, searched / "images" / "test", found, arguments=arguments)
    merged = folder / "found.json"
    sniper("merge", found, "--manifest", searched, "-o", merged, "--category-ids", "from-0")
    scores = sniper("evaluate", merged, test_set)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    result = {
        "arm": arm,
        "seed": seed,
        "views": num_views,
        "megapixels": round(num_views * side**2 / 1e6, 1),
        "train_seconds": round(trained),
        **{name: scores[name] for name in names if name in scores},
    }
    kept.write_text(json.dumps(result))
    return result


def sniper(*arguments: object) -> dict[str, Any]:
    """Run a command of sniper, and return its result."""
    program = "from sniper.cli import main; main()"
    command = [sys.executable, "-c", program, *map(str, arguments), "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[3:])}\n{done.stderr}")
    return dict(json.loads(done.stdout))


def count_images(dataset: Path) -> int:
    """Count the images to train on."""
    return sum(1 for _ in (dataset / "images" / "train").iterdir())


def write_list(dataset: Path, *, num_views: int, folder: Path, seed: int) -> tuple[Path, int]:
    """Write the list of images to train on, so that whole epochs have the number of views; return it and the epochs."""
    names = sorted(str(path.absolute()) for path in (dataset / "images" / "train").iterdir())
    num_epochs = max(round(num_views / len(names)), 1)
    per_epoch = num_views // num_epochs
    shuffled = random.Random(seed).sample(names, len(names))
    chosen = (shuffled * (per_epoch // len(names) + 1))[:per_epoch]
    (folder / "train.txt").write_text("".join(f"{name}\n" for name in chosen))
    content = yaml.safe_load((dataset / "data.yaml").read_text())
    content |= {
        "train": str((folder / "train.txt").absolute()),
        "val": str((dataset / content["val"]).absolute()),
    }
    content["nc"] = len(content["names"])
    path = folder / "list.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, num_epochs


def train(data: Path, *, num_epochs: int, folder: Path, seed: int, arguments: argparse.Namespace) -> Path:
    """Train YOLOX from random weights, and return its weights."""
    import torch
    from libreyolo import LibreYOLOX

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(seed)
    classes = yaml.safe_load(data.read_text())["nc"]
    model = LibreYOLOX(None, size=arguments.size, nb_classes=classes, device=device())
    trained = model.train(
        str(data),
        epochs=num_epochs,
        batch=arguments.batch,
        imgsz=arguments.chip_size,
        device=device(),
        workers=0,
        seed=seed,
        optimizer="adamw",
        lr0=0.002,
        project=str(folder.absolute()),
        name="run",
        exist_ok=True,
        pretrained=False,
        amp=False,
        mosaic_prob=0.0,
        mixup_prob=0.0,
        degrees=0.0,
        shear=0.0,
        translate=0.0,
        no_aug_epochs=0,
        warmup_epochs=0.1 * num_epochs,
        ema_decay=0.998,
        eval_interval=0,
    )
    return Path(trained["last_checkpoint"])


def detect(weights: Path, images: Path, target: Path, *, arguments: argparse.Namespace) -> None:
    """Detect objects in all images of a folder, and write COCO results with file names and class numbers."""
    import torch
    from libreyolo import LibreYOLOX

    torch.set_num_threads(arguments.threads)
    model = LibreYOLOX(str(weights), size=arguments.size, device=device())
    entries = []
    for path in sorted(images.iterdir()):
        found = model(str(path), conf=0.001, iou=0.65, imgsz=arguments.window, max_det=300)
        found = found[0] if isinstance(found, Sequence) else found
        boxes = zip(
            found.boxes.xyxy.tolist(), found.boxes.conf.tolist(), found.boxes.cls.tolist(), strict=True
        )
        for (x1, y1, x2, y2), score, label in boxes:
            box = [x1, y1, x2 - x1, y2 - y1]
            entries.append({"image_id": path.name, "category_id": int(label), "bbox": box, "score": score})
    target.write_text(json.dumps(entries))


def device() -> str:
    """Return the device to compute on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
