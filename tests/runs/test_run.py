"""The folder of a run: metrics, checkpoints that are complete or absent, and continuing from them."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from sniper.errors import CheckpointError, RunError
from sniper.runs.checkpoints import Checkpoint, Counters, Progress
from sniper.runs.run import Run
from tests.training.experiments import TrainedRun, have_equal_weights, train_run

OTHER = Counters(num_shares=7)


def cut_short(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def test_a_run_with_a_checkpoint_is_not_overwritten(trained: TrainedRun) -> None:
    with pytest.raises(RunError, match=r"a run is already there; continue it \(--resume, resume=True\)"):
        Run.create(trained.run.folder, config="")


def test_a_run_without_a_checkpoint_is_started_over(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config="first")
    run.log({"stage": "train", "step": 1})
    (run.folder / "chips_000.npz").touch()
    again = Run.create(tmp_path / "run", config="second")
    assert again.config_path.read_text() == "second"
    assert sorted(path.name for path in again.folder.iterdir()) == ["checkpoints", "config.yaml"]


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no run \(config\.yaml is missing\)"):
        Run.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="the folder of the run cannot be created"):
        Run.create(tmp_path / "file", config="")


def test_metrics_are_json_and_drop_a_line_cut_short(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config="")
    assert run.entries() == []
    for step in (1, 2, 3):
        run.log({"step": step, "loss": float("inf")})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 4, "lo')
    message = r"metrics\.jsonl: cannot be read and is left out: line 4 \(cut short\)"
    with pytest.warns(UserWarning, match=message):
        assert run.entries()[-1] == {"step": 3, "loss": None}
    with pytest.warns(UserWarning, match=message):
        run.truncate_metrics(step=2)
    assert [entry["step"] for entry in run.entries()] == [1, 2]


def test_a_checkpoint_of_the_same_step_is_replaced(trained: TrainedRun) -> None:
    checkpoint = trained.run.load_checkpoint(trained.dataset.identity)
    assert checkpoint is not None
    before = trained.run.checkpoints
    other = dataclasses.replace(checkpoint, counters=OTHER)
    assert other.save(trained.run.folder / "checkpoints") == before[-1]
    assert sorted((trained.run.folder / "checkpoints").iterdir()) == before
    assert Checkpoint.load(before[-1]).counters == OTHER


@pytest.mark.parametrize(("num_renamed", "is_new"), [(0, False), (1, False), (2, True)])
def test_a_checkpoint_survives_a_kill_while_it_is_replaced(
    num_renamed: int, is_new: bool, trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = trained.run, trained.run.folder / "checkpoints"
    checkpoint = run.load_checkpoint(trained.dataset.identity)
    assert checkpoint is not None
    before = run.checkpoints
    renames: list[Path] = []
    rename = Path.replace

    def stop(path: Path, target: Path) -> Path:
        if len(renames) == num_renamed:
            raise KeyboardInterrupt
        renames.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            dataclasses.replace(checkpoint, counters=OTHER).save(folder)
    assert len(renames) == num_renamed
    run.restore_replaced()
    assert run.checkpoints == sorted(folder.iterdir()) == before
    assert Checkpoint.load(before[-1]).counters == (OTHER if is_new else checkpoint.counters)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", r"line 2 \(Expected `object`, got `array`"),
        (b"null", r"line 2 \(Expected `object`"),
        (b'{"stage": "train"}', r"line 2 \(Object missing required field `step`"),
        (b'{"step": "2"}', r"line 2 \(Expected `int`, got `str` - at `\$\.step`"),
        (b'{"step": -2}', r"line 2 \(Expected `int` >= 0"),
        (b'{"step": true}', r"line 2 \(Expected `int`, got `bool`"),
        (b'{"step": 2, "stage": "evaluate", "ap": 0.5}', r"line 2 \(Object missing required field `epoch`"),
        (b'{"step": 2, "stage": "evaluate", "epoch": 1, "ap": [0.5]}', r"line 2 \(Expected `float \| null`"),
        (b'{"step": 2, "learning_rate": 0.1}', r"line 2 \(Object missing required field `loss`"),
        (b"\xff\xfe", r"line 2 \(JSON is malformed"),
        (b"\0" * 50, r"line 2 \(JSON is malformed"),
        (b"[" * 100_000, r"line 2 \("),
        (b'{"step": 2} {"step": 3}', r"line 2 \(JSON is malformed"),
    ],
)
def test_a_broken_line_of_the_metrics_is_left_out_with_its_number(
    tmp_path: Path, line: bytes, message: str
) -> None:
    run = Run.create(tmp_path / "run", config="")
    run.metrics_path.write_bytes(b'{"step": 1, "stage": "train"}\n' + line + b'\n\n{"step": 3}\n')
    with pytest.warns(UserWarning, match=rf"metrics\.jsonl: cannot be read and is left out: {message}"):
        assert [entry["step"] for entry in run.entries()] == [1, 3]
    with pytest.warns(UserWarning, match=message):
        run.truncate_metrics(step=3)
    assert run.metrics_path.read_bytes() == b'{"step": 1, "stage": "train"}\n{"step": 3}\n'


def test_metrics_that_are_no_file_are_refused_by_name(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config="")
    run.metrics_path.mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be read \(Is a directory; name a file"):
        run.entries()


def test_a_run_with_a_broken_line_of_metrics_is_continued(trained: TrainedRun) -> None:
    with trained.run.metrics_path.open("a") as file:
        file.write('{"step": 4, "lo')
    with pytest.warns(UserWarning, match="cut short"):
        train_run(trained.run, trained.spec, trained.dataset)
    assert trained.run.entries()


def test_folders_that_are_not_named_by_a_step_are_no_checkpoints(trained: TrainedRun) -> None:
    checkpoints = trained.run.checkpoints
    for name in ("\u00b2", "\u0663", "best", "-1"):
        (trained.run.folder / "checkpoints" / name).mkdir()
    assert trained.run.checkpoints == checkpoints


def test_only_the_newest_checkpoints_are_kept(trained: TrainedRun) -> None:
    last = trained.reports[-1].progress.step
    assert [int(path.name) for path in trained.run.checkpoints] == [last - 2, last - 1, last]


def test_a_checkpoint_is_read_back_as_it_was_written(trained: TrainedRun, tmp_path: Path) -> None:
    checkpoint = trained.run.load_checkpoint(trained.dataset.identity)
    assert checkpoint is not None
    again = Checkpoint.load(checkpoint.save(tmp_path / "copies"))
    assert (again.progress, again.counters, again.identity, again.ema) == (
        checkpoint.progress,
        checkpoint.counters,
        trained.dataset.identity,
        None,
    )
    assert again.progress.step == trained.reports[-1].progress.step
    for name in ("weights", "optimizer"):
        tensors, expected = getattr(again, name), getattr(checkpoint, name)
        assert tensors.keys() == expected.keys()
        assert all(tensors[key].equal(expected[key]) for key in expected)


def test_a_checkpoint_cut_short_is_refused_and_the_previous_one_named(trained: TrainedRun) -> None:
    older, newest = trained.run.checkpoints[-2:]
    cut_short(newest / "weights.safetensors", 5000)
    message = (
        rf"weights\.safetensors: cannot be read as a checkpoint .*--resume --step {int(older.name)}, or by"
    )
    with pytest.raises(CheckpointError, match=message):
        trained.run.load_checkpoint(trained.dataset.identity)
    others = rf"other checkpoints are of step \d+, {int(older.name)}: predict with one of them"
    with pytest.raises(CheckpointError, match=others):
        trained.run.load_weights("last")
    trained.run.load_weights(int(older.name))


def test_a_run_is_not_continued_on_another_data_set(trained: TrainedRun) -> None:
    other = dataclasses.replace(trained.dataset.identity, digest="0")
    assert trained.run.is_trained_on(trained.dataset.identity)
    assert not trained.run.is_trained_on(other)
    for check in (trained.run.check_trained_on, trained.run.load_checkpoint):
        with pytest.raises(CheckpointError, match="was trained on other images, boxes or categories"):
            check(other)


def test_weights_that_a_training_removes_are_not_waited_for(trained: TrainedRun) -> None:
    run = trained.run
    first, second, _ = run.checkpoints
    log_evaluation(run, int(first.name), ap=0.5)
    log_evaluation(run, int(second.name), ap=0.4)
    read: list[Path] = []

    def read_once_removed(path: Path) -> int:
        read.append(path.parent)
        if path.parent == first:
            shutil.rmtree(first)
        return len(path.read_bytes())

    assert run.read_weights("best", read_once_removed) > 0
    assert read == [first, second]


def test_missing_weights_of_a_checkpoint_that_is_there_are_an_error(trained: TrainedRun) -> None:
    run = trained.run
    (run.checkpoints[-1] / "weights.safetensors").unlink()
    for choice in ("best", "last"):
        with pytest.raises(CheckpointError, match=r"weights\.safetensors: cannot be read as a checkpoint"):
            run.load_weights(choice)


def test_a_run_without_a_checkpoint_fits_every_data_set(trained: TrainedRun, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "new", config="")
    run.check_trained_on(trained.dataset.identity)
    assert run.load_checkpoint(trained.dataset.identity) is None
    with pytest.raises(RunError, match="no checkpoint yet"):
        run.load_weights()


def test_a_rewound_run_ends_with_the_same_weights(trained: TrainedRun, trained_once: TrainedRun) -> None:
    run = trained.run
    older, last = run.checkpoints[-2:]
    cut_short(last / "optimizer.safetensors", 100)
    with pytest.raises(RunError, match=r"there is no checkpoint of step 999; there are \d+, "):
        run.rewind_to(999)
    run.rewind_to(int(older.name))
    assert run.checkpoints[-1] == older
    assert (last.parent / f"{last.name}.old" / "weights.safetensors").is_file()
    train_run(run, trained.spec, trained.dataset)
    assert have_equal_weights(run, trained_once.run)


def test_rewinding_renames_the_chips_of_later_epochs(trained: TrainedRun) -> None:
    for epoch in (0, 1, 2):
        (trained.run.folder / f"chips_{epoch:03d}.npz").touch()
    checkpoint = Checkpoint.load(trained.run.checkpoints[0])
    trained.run.rewind_to(checkpoint.progress.step)
    assert checkpoint.progress.epoch == 1
    assert sorted(path.name for path in trained.run.folder.glob("chips_*")) == [
        "chips_000.npz",
        "chips_001.npz",
        "chips_002.npz.old",
    ]


def test_progress_counts_steps_and_epochs() -> None:
    progress = Progress(step=7, epoch=1, step_in_epoch=2)
    assert progress.next_step() == Progress(step=8, epoch=1, step_in_epoch=3)
    assert progress.next_epoch() == Progress(step=7, epoch=2, step_in_epoch=0)


def log_evaluation(run: Run, step: int, *, ap: float, num_images: int = 4) -> None:
    run.log({"stage": "evaluate", "step": step, "epoch": step / 4, "ap": ap, "num_images": num_images})


def test_the_best_checkpoint_is_used_and_the_newest_where_none_is_scored(trained: TrainedRun) -> None:
    run = trained.run
    first, second, last = run.checkpoints
    assert run.best is None
    assert run.weights_path.parent == last
    log_evaluation(run, int(first.name), ap=0.3)
    log_evaluation(run, int(second.name), ap=0.5)
    log_evaluation(run, int(last.name), ap=0.4)
    assert run.weights_path.parent == second
    assert run.find_weights("last").parent == last
    assert run.find_weights(int(first.name)).parent == first
    with pytest.raises(RunError, match="there is no checkpoint of step 999; there are"):
        run.find_weights(999)
    assert run.load_weights()[2].parent == second
    assert run.progress.step == int(last.name)


def test_the_next_best_checkpoint_is_used_if_the_best_was_deleted(trained: TrainedRun) -> None:
    run = trained.run
    first, second, last = run.checkpoints
    for path, ap in ((first, 0.3), (second, 0.5), (last, 0.2)):
        log_evaluation(run, int(path.name), ap=ap)
    shutil.rmtree(second)
    assert run.weights_path.parent == first
    run.rewind_to(int(first.name))
    run.truncate_metrics(step=int(first.name))
    assert run.weights_path.parent == first
    assert len(run.evaluations) == 1


def test_scores_on_other_images_and_undefined_ones_are_not_compared(trained: TrainedRun) -> None:
    run = trained.run
    first, second, last = (int(path.name) for path in run.checkpoints)
    log_evaluation(run, first, ap=0.9, num_images=2)
    log_evaluation(run, second, ap=-1.0)
    assert run.best is None
    log_evaluation(run, last, ap=0.0)
    assert run.best is not None
    assert (run.best.step, len(run.evaluations)) == (last, 2)


def test_of_equal_scores_the_later_one_is_the_best(trained: TrainedRun) -> None:
    first, second, _ = (int(path.name) for path in trained.run.checkpoints)
    for step in (first, second):
        log_evaluation(trained.run, step, ap=0.25)
    assert trained.run.best is not None
    assert trained.run.best.step == second
