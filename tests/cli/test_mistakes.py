"""Mistakes that users make on the command line, and what each is answered with."""

import shlex
from pathlib import Path

import pytest

from sniper.cli.main import app
from sniper.cli.unknown import OTHER_NAMES, RENAMED, parse_overrides
from sniper.config.loading import list_fields, load_experiment, load_partial, parse_experiment
from sniper.errors import ConfigError
from sniper.runs.processes import available_devices, select_device
from tests.cli.commands import CommandLine

TRAIN = "train experiment.yaml"

MISTAKES = [
    # values of fields: the option is named, in the form that it is given in
    (f"{TRAIN} --train.milestones 8", "--train.milestones: must be a list, not 8 (--train.milestones '[8]')"),
    (f"{TRAIN} --train.milestones 8,11", "not '8,11' (--train.milestones '[8, 11]')"),
    (f"{TRAIN} --train.milestones 8 11", "11: belongs to no option; a list is written in quotes, such as "),
    (f"{TRAIN} --train.milestones [8, 11] --seed 3", "such as --train.milestones '[8, 11]'"),
    (
        f"{TRAIN} --train.milestones [8,",
        "--train.milestones [8,: the bracket is not closed; in a shell, quote",
    ),
    (f"{TRAIN} --train.epochs '[8]'", "must be a valid number, not [8] (--train.epochs 8)"),
    (f"{TRAIN} --pyramid.levels 3", "must be a list, not 3 (--pyramid.levels '[{long_side: 512}]')"),
    (f"{TRAIN} --train.epochs=-1", "error: --train.epochs: must be greater than 0, not -1"),
    (f"{TRAIN} --train.epochs many", "error: --train.epochs: must be a valid number, not 'many'"),
    (f"{TRAIN} --train.compile 1", "error: --train.compile: must be a valid boolean, not 1"),
    (f"{TRAIN} --train.optimizer adam", "error: --train.optimizer: must be 'sgd' or 'adamw', not 'adam'"),
    (f"{TRAIN} --train 3", "error: --train: is a section, not a field; its fields are set one by one"),
    (f"{TRAIN} --model.backbone resnet50", "one by one, such as --model.backbone.name"),
    (f"{TRAIN} --train.epochs.x 3", "error: --train.epochs.x: train.epochs: must be a valid number"),
    (f"{TRAIN} --train.epochs 3 --train.epochs 4", "--train.epochs: is set twice, to 3 and to 4"),
    (
        f"{TRAIN} --train.clip_gradient 3",
        "error: --train.clip_gradient was renamed to --train.clip_grad_norm",
    ),
    ("train train.json --train.epochs -1", "error: --train.epochs: must be greater than 0, not -1"),
    # rules for several fields: the option, not the file
    (
        f"{TRAIN} --train.accumulation_steps 3",
        "error: --train.accumulation_steps: accumulation_steps: a batch",
    ),
    (f"{TRAIN} --data.holdout 0.5", "error: --data.holdout: holdout must be 0 with test.annotations"),
    (f"{TRAIN} --negatives.source rpn --train.rpn_only true", "--negatives.source and --train.rpn_only: "),
    # names of fields
    (f"{TRAIN} --train.epoch 3", "error: --train.epoch is not known; did you mean --train.epochs?"),
    (
        f"{TRAIN} --train.num_workers 0",
        "error: --train.num_workers is not known; did you mean --data.num_workers?",
    ),
    (f"{TRAIN} --trian.epochs 3", "error: --trian.epochs: trian is not known; did you mean train?"),
    (f"{TRAIN} --channels 3", "use --model.rpn.channels or --model.roi_head.channels"),
    (f"{TRAIN} --batch_size 8", "--batch_size: no such option; use --train.batch_size"),
    (f"{TRAIN} --batch-size 8", "--batch-size: no such option; use --train.batch_size"),
    # names of other libraries and habits
    (f"{TRAIN} --lr=0.1", "--lr: no such option; use --train.learning_rate"),
    (f"{TRAIN} --imgsz 640", "--imgsz: no such option; use --pyramid.chip_size"),
    (f"{TRAIN} --data coco.yaml", "--data: no such option; use DATA (sniper train DATA [--SECTION"),
    (f"{TRAIN} --weights yolo.pt", "use --weights-from or --model.backbone.weights"),
    (f"{TRAIN} --ckpt yolo.pt", "--ckpt: no such option; use --weights-from"),
    (f"{TRAIN} --epoch 3", "--epoch: no such option; did you mean --epochs?"),
    (f"{TRAIN} --batchsize 8", "--batchsize: no such option; did you mean --train.batch_size?"),
    (f"{TRAIN} --optimiser sgd", "--optimiser: no such option; did you mean --train.optimizer?"),
    (f"{TRAIN} --chipsize 512", "--chipsize: no such option; did you mean --pyramid.chip_size?"),
    (f"{TRAIN} --foo 3", "--foo: sniper train has no such option; it has --val, --epochs"),
    (f"{TRAIN} -b 8", "-b: sniper train has no such option"),
    (f"{TRAIN} epochs=3", "epochs=3: expected an option with dashes, such as --epochs 3"),
    (f"{TRAIN} train.json", "train.json: expected --section.field VALUE; there is one data set"),
    (f"{TRAIN} --epochs 0", "Must be > 0"),
    (f"{TRAIN} --epochs inf", "Must be < inf"),
    (f"{TRAIN} --device gpu", "device gpu: there is no such device; this machine has cpu"),
    (f"{TRAIN} --device 0", "device 0: there is no such device; this machine has cpu"),
    (f"{TRAIN} --weights-from none", "model.weights_from: "),
    (f"{TRAIN} --weights-from images", "images: there is no run (config.yaml is missing)"),
    (f"{TRAIN} --weights-from train.json", "Weights of torchvision's detectors belong to model.weights"),
    (f"{TRAIN} --config other.yaml", "--config: needs a data set"),
    (
        "train train.json --model.mask_head '{}' --model.backbone.pretrained false",
        "train.json has no masks to learn from; set model.mask_head to null",
    ),
    ("train data=coco.yaml", "data=coco.yaml: no such file; expected a data set"),
    (
        "train train.json --config run",
        "--config run: cannot be read (Is a directory; name a file, not a folder)",
    ),
    ("train train.json --config experiment.yaml", "experiment.yaml: data.train.annotations: is the data set"),
    ("train train.json --data.train.annotations a.json", "error: --data.train.annotations: is the data set"),
    ("predict run --imgsz 640", "predict.levels"),
    ("predict run --iou 0.5", "predict.merge_iou"),
    ("predict run --max-det 3", "predict.max_detections"),
    (
        "predict run --source a.jpg",
        "--source: no such option; use FILES (sniper predict RUN [FILES]... [--predict.FIELD VALUE]... "
        "[--data.read.FIELD VALUE]...)",
    ),
    ("predict run --weights best.pt", "--weights: no such option; use RUN (sniper predict RUN"),
    ("predict run --save-dir x", "--save-dir: no such option; use --output"),
    ("predict run --show", "--show: no such option; use --draw"),
    ("predict run --lr 3", "--lr: sniper predict has no such option; sniper train has --train.learning_rate"),
    ("predict run --device gpu", "device gpu: there is no such device; this machine has cpu"),
    ("predict run --image-root x", "--image-root was renamed to --images"),
    ("predict run --predict.focus '{min_scores: 1}'", "not known; did you mean --predict.focus.min_score?"),
    ("predict run --predict.focus all", "(min_score, window, cues) or 'auto' or null, not 'all'"),
    ("predict none", "none: there is no run (config.yaml is missing); runs in .: run"),
    ("predict .", ".: there is no run (config.yaml is missing); runs in .: run"),
    ("predict run imags", "imags: no such file or folder; did you mean images?"),
    ("predict train.json run", "train.json: there is no run; expected its folder, or a model that"),
    ("evaluate train.json run", "run: the folder of a run comes first: sniper evaluate run train.json"),
    ("evaluate train.json train.json --conf 0.5", "--conf: no such option; use --min-score"),
    ("recipes --conf 0.5", "no such option; sniper browse, predict and evaluate have --min-score"),
    ("evaluate train.json train.json --max-det 9", "--max-det: no such option; use --max-detections"),
    ("evaluate --gt train.json --dt d.json", "--gt: no such option; use ANNOTATIONS (sniper evaluate"),
    ("evaluate train.json train.json extra", "extra: expected one data set, after train.json"),
    ("evaluate train.json train.json --device cpu", "--device requires the folder of a run, not detections"),
    ("check train.json extra", "extra: is one argument too many; usage: sniper check ANNOTATIONS"),
    (
        "check train.json --device cpu",
        "; sniper plan, train, mine, predict, evaluate, focus and demo have it",
    ),
    ("plan train.json --imgsz 512", "it is pyramid.chip_size in an experiment file (--config FILE)"),
    ("plan train.json --conf 0.5", "--conf: sniper plan has no such option; "),
    ("plan train.json --batch 8", "--batch: no such option; use --batch-size"),
    ("plan train.json --epochs 3", "it is train.epochs in an experiment file (--config FILE)"),
    ("plan train.json --train.epochs 3", "sniper plan has no such option; "),
    ("plan train.json --config train.json", "train.json: is no experiment: expected sections (seed, data"),
    ("plan train.json --config none.yaml", "none.yaml: cannot be read (No such file or directory)"),
    ("plan train.json --device gpu --measure", "device gpu: there is no such device; this machine has cpu"),
    ("plan train.json --crowd 3", "--crowd was renamed to --crowded-above"),
    ("mine run --imgsz 640", "it is predict.levels in config.yaml of the run"),
    (
        "mine run --data train.json",
        "--data: no such option; use ANNOTATIONS (sniper mine RUN [ANNOTATIONS] | ",
    ),
    ("mine run --detections d.json", "--detections: no such option; use --from"),
    ("mine run --device gpu", "device gpu: there is no such device; this machine has cpu"),
    ("chips train.json -o c.npz --chip-size 3", "--chip-size: no such option; use --pyramid.chip_size"),
    ("chips train.json -o c.npz --seed x", "--seed"),
    ("chips train.json", "expected -o FILE.npz, the chip table to write"),
    ("convert train.json out --to coc", 'Choose from: "coco", "yolo", "voc"'),
    ("convert train.json out --to coco --output x", "--output: no such option; use OUT (sniper convert"),
    ("convert train.json out --to coco --image-root x", "--image-root: no such option; use --root"),
    ("check train.json --data x", "--data: no such option; use ANNOTATIONS (sniper check ANNOTATIONS)"),
    ("check train.json --conf 0.5", "--conf: sniper check has no such option"),
    ("check train.json --fix", "--fix: sniper check has no such option; it has --images, --split"),
    ("check none.json", "none.json: cannot be read"),
    ("recipes coco", "coco: is one argument too many; usage: sniper recipes"),
    ("demo --output x", "--output: no such option; use --run"),
    ("demo --lr 3", "--lr: sniper demo has no such option; sniper train has --train.learning_rate"),
    ("demo --device gpu", "device gpu: there is no such device; this machine has cpu"),
    ("val run", "val: no such command; use sniper evaluate"),
    ("detect run", "detect: no such command; use sniper predict"),
    ("train.json", "train.json: expected a command first, such as sniper train train.json"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_answered_with_what_to_do(
    trained_folder_once: Path,
    sniper: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(trained_folder_once)
    answer = sniper.error(*shlex.split(arguments))
    assert message in answer
    assert not any(
        blamed in answer.partition("usage")[0] for blamed in ("experiment.yaml: --", "experiment.yaml: train")
    )


def test_the_names_of_other_libraries_lead_to_options_that_exist() -> None:
    collections = {name: app[name].assemble_argument_collection() for name in app if not name.startswith("-")}
    options = {name for each in collections.values() for argument in each for name in argument.names}
    usages = [str(app[name].usage).replace("[", " ").replace("]", " ").split() for name in collections]
    for ours in {
        name for candidates in OTHER_NAMES.values() for each in candidates for name in each.split(" or ")
    }:
        is_argument = ours.isupper() and any(ours in usage for usage in usages)
        assert is_argument or ours in list_fields() or f"--{ours}" in options, ours
    for (command, _), new in RENAMED.items():
        assert any(f"--{new}" in argument.names for argument in collections[command])


def test_an_error_names_the_source_of_a_value(tmp_path: Path) -> None:
    """A value is from a file, from a file of some fields, from an option or from Python."""
    path = tmp_path / "mine.yaml"
    path.write_text("train: {epochs: -1, accumulation_steps: 4, batch_size: 8}")
    for load in (load_experiment, load_partial):
        with pytest.raises(ConfigError) as caught:
            load(path, overrides={"--seed": "-1", "train.momentum": "2"})
        first, *others = str(caught.value).split("; ")
        assert [first, *sorted(others)] == [
            f"{path}: train.epochs: must be greater than 0, not -1",
            "--seed: must be greater than or equal to 0, not -1",
            "train.momentum: must be less than 1, not 2",
        ]
    path.write_text("train: {accumulation_steps: 4, batch_size: 8}")
    for label in ("--train.batch_size", "train.batch_size"):
        with pytest.raises(ConfigError) as caught:
            load_experiment(path, overrides={label: "10"})
        assert str(caught.value).startswith(f"{label}: accumulation_steps: a batch of 10 chips")


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ("train: {milestones: 8}", None, "f.yaml: train.milestones: must be a list, not 8 (such as [8])"),
        ("", "train.milestones", "train.milestones: must be a list, not 8 (such as [8])"),
        ("", "--train.milestones", "--train.milestones: must be a list, not 8 (--train.milestones '[8]')"),
        ("train: {epochs: [3]}", None, "f.yaml: train.epochs: must be a valid number, not [3] (such as 3)"),
    ],
)
def test_a_list_or_a_number_is_shown_as_its_source_writes_it(
    text: str, label: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(text, source=Path("f.yaml"), overrides={label: "8"} if label else {})
    assert str(caught.value) == message


def test_overrides_are_not_set_twice() -> None:
    with pytest.raises(ConfigError, match=r"--train\.epochs: is set twice, to 3 and to 4"):
        parse_overrides(["--train.epochs=3", "--train.epochs", "4"])


def test_the_devices_of_the_machine_can_be_selected() -> None:
    for name in available_devices():
        assert str(select_device(name)) == name
