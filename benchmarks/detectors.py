"""Measure what a level should teach a one-stage detector, and whether chips pay for one at all.

    python benchmarks/detectors.py runs/detectors --data NAME TRAIN.json --val NAME VAL.json \\
        --weights mobilenetv2.safetensors --seeds 0 1 --megapixels 160

FCOS and RetinaNet of torchvision on a feature pyramid over MobileNetV2 are trained for the same megapixels:

- `valid`: on chips of the paper's three levels, halved, with a side of 256. The boxes in the valid range of a level are
  objects, the others are ignored.
- `all`: on the same chips, with all their boxes as objects.
- `tiles`: on a blind grid of tiles of 256 pixels, of images that are enlarged as for the middle level.
- `whole`: on whole images at the scale of that level.

The first two are searched at the three levels, the others at the scale that they are trained at. See `variants.py` for
the rest.
"""

from dataclasses import replace
from typing import Any

from variants import Study, parser_for, run_study

from sniper.chips.pyramid import PAPER_LEVELS
from sniper.config.experiment import widened
from sniper.config.loading import to_plain

CHIP_SIZE = 256
RATIO = 0.5  # of the chips to the paper's

DETECTORS = ("fcos", "retinanet")


def plain_levels(levels: Any) -> list[dict[str, Any]]:
    """Return levels as a configuration has them, without what is not set."""
    return [
        {name: value for name, value in level.items() if value not in (None, float("inf"))}
        for level in to_plain(levels)
    ]


def variants_of(name: str) -> dict[str, dict[str, Any]]:
    """Return the four trainings of a detector, by name."""
    *finer, coarsest = PAPER_LEVELS
    scaled = [replace(level, factor=round(level.factor * RATIO, 4)) for level in finer if level.factor]
    levels = (*scaled, replace(coarsest, long_side=CHIP_SIZE))
    factor = scaled[-1].factor
    model = {"model.kind": "torchvision", "model.name": name, "negatives.source": "none"}
    chips = {
        **model,
        "pyramid.chip_size": CHIP_SIZE,
        "pyramid.levels": plain_levels(levels),
        "predict.levels": plain_levels(widened(levels)),
    }
    single = {**chips, "predict.levels": [{"factor": factor}]}
    tiles = {"side": CHIP_SIZE, "factor": factor, "empty": "drop"}
    return {
        f"{name}_valid": {**chips, "model.labels": "valid"},
        f"{name}_all": {**chips, "model.labels": "all"},
        f"{name}_tiles": {**single, "data.tiles": tiles, "data.min_visible_side": 0.0},
        f"{name}_whole": {**single, "data.whole": {"levels": [{"factor": factor}]}},
    }


STUDY = Study(
    description=__doc__,
    base="fcos_valid",
    variants={key: value for name in DETECTORS for key, value in variants_of(name).items()},
    bases={key: f"{name}_valid" for name in DETECTORS for key in variants_of(name)},
    columns=("ap50", "ap_small", "ap_medium", "ap_large", "ar_100"),
)


if __name__ == "__main__":
    run_study(STUDY, parser_for(STUDY).parse_args())
