"""Measure what a level should teach a one-stage detector, and whether chips pay for one at all.

    python benchmarks/detectors.py runs/detectors --data NAME TRAIN.json --val NAME VAL.json \\
        --weights mobilenetv2.safetensors --seeds 0 1 --megapixels 160

FCOS and RetinaNet of torchvision on a feature pyramid over MobileNetV2 are trained for the same megapixels:

- `valid`: on chips of the paper's three levels, halved, with a side of 256; with `--derived`, on those that are derived
  from the data set. The boxes in the valid range of a level are objects, the others are ignored.
- `all`: on the same chips, with all their boxes as objects.
- `tiles`: on a blind grid of tiles of 256 pixels of the images as they are.
- `whole`: on whole images as they are.

The first two are searched at the levels of their chips, the others at factor 1. No variant has negative chips; tiles
without objects are left out. See `variants.py` for the rest.
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


def variants_of(name: str, *, is_derived: bool) -> dict[str, dict[str, Any]]:
    """Return the four trainings of a detector, by name."""
    model = {"model.kind": "torchvision", "model.name": name, "negatives.source": "none"}
    *finer, coarsest = PAPER_LEVELS
    scaled = [replace(level, factor=round(level.factor * RATIO, 4)) for level in finer if level.factor]
    levels = (*scaled, replace(coarsest, long_side=CHIP_SIZE))
    pyramid = {
        "pyramid.chip_size": CHIP_SIZE,
        "pyramid.levels": plain_levels(levels),
        "predict.levels": plain_levels(widened(levels)),
    }
    chips = model if is_derived else {**model, **pyramid}
    single = {**model, **pyramid, "predict.levels": [{"factor": 1.0}]}
    tiles = {"side": CHIP_SIZE, "factor": 1.0, "empty": "drop"}
    return {
        f"{name}_valid": {**chips, "model.labels": "valid"},
        f"{name}_all": {**chips, "model.labels": "all"},
        f"{name}_tiles": {**single, "data.tiles": tiles, "data.min_visible_side": 0.0},
        f"{name}_whole": {**single, "data.whole": {"levels": [{"factor": 1.0}]}},
    }


def study(*, is_derived: bool) -> Study:
    by_name = {name: variants_of(name, is_derived=is_derived) for name in DETECTORS}
    return Study(
        description=__doc__,
        base="fcos_valid",
        variants={key: value for variants in by_name.values() for key, value in variants.items()},
        bases={key: f"{name}_valid" for name, variants in by_name.items() for key in variants},
        columns=("ap50", "ap_small", "ap_medium", "ap_large", "ar_100"),
    )


def main() -> None:
    parser = parser_for(study(is_derived=False))
    parser.add_argument("--derived", action="store_true", help="take the levels derived from the data set")
    options = parser.parse_args()
    run_study(study(is_derived=options.derived), options)


if __name__ == "__main__":
    main()
