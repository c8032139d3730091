"""Measure the choices that `sniper train DATA` makes for every data set: one is changed at a time.

    python benchmarks/choices.py runs/choices --data NAME TRAIN.json --weights mobilenetv2.safetensors --seeds 0 1

Each cell trains with the settings that are derived from the data set and the change, for the same megapixels; where a
change makes a pixel more expensive (`concat`, `batch8`), for those that take the same processor time. Writes `table.md`
to the folder. See `variants.py` for the rest.
"""

from variants import Study, parser_for, run_study

STUDY = Study(
    description=__doc__,
    base="derived",
    costly=("concat", "batch8"),
    variants={
        "derived": {},
        "concat": {"model.backbone.neck": "concat"},
        "cosine": {"train.schedule": "cosine"},
        "ema": {"train.ema_decay": 0.998},
        "color": {"data.color_jitter": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.02}},
        "scale": {"data.scale_jitter": 0.25},
        "from_8": {"useful_sizes": (8.0, 480.0)},
        "from_12": {"useful_sizes": (12.0, 480.0)},
        "from_24": {"useful_sizes": (24.0, 480.0)},
        "from_32": {"useful_sizes": (32.0, 480.0)},
        "sgd": {"train.optimizer": "sgd"},
        "rate_half": {"train.learning_rate": 0.00025},
        "rate_double": {"train.learning_rate": 0.001},
        "batch8": {"train.batch_size": 8},
    },
)


if __name__ == "__main__":
    run_study(STUDY, parser_for(STUDY).parse_args())
