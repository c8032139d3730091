"""The offline files of Weights & Biases have one run for a run folder, with its experiment, metrics and scores."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from sniper.training.callbacks import Callbacks
from sniper.training.trackers import build_trackers
from tests.training.trackers.reports import WrittenRun

pytest.importorskip("wandb")

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def track(warnings: list[str] | None = None) -> Callbacks:
    on_warning = pytest.fail if warnings is None else warnings.append
    return Callbacks.of(build_trackers(("wandb",), Callbacks(on_warning=on_warning)))


def read_records(path: Path) -> Iterator[Any]:
    """Read a file of W&B: a header, then protobuf records in the log format of LevelDB."""
    records = import_module("wandb.proto.wandb_internal_pb2")
    content = path.read_bytes()
    position, record = 7, b""
    while position + 7 <= len(content):
        left = 32_768 - position % 32_768
        if left < 7:  # padding at the end of a block
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield records.Record.FromString(record)
            record = b""


def values_of(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def test_a_killed_training_and_the_resumed_one_are_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = WrittenRun(tmp_path)
    killed = track()
    run.start(killed)
    for step in (1, 2, 3):
        run.step(killed, step)
    run.end(killed)  # which makes the file complete
    run.cut(2)
    resumed = track()
    run.start(resumed)
    run.step(resumed, 3)
    run.scores(resumed, 3, ap=0.5)
    run.end(resumed)
    import_module("wandb").teardown()  # wait for its process, which writes the files
    first, second = (
        list(read_records(path)) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    )
    heads = [next(each.run for each in records if each.HasField("run")) for records in (first, second)]
    assert heads[0].run_id == heads[1].run_id
    assert {(head.project, head.display_name) for head in heads} == {("sniper", tmp_path.name)}
    config = values_of(heads[0].config.update)
    assert config["train"]["epochs"] == 2.0
    assert config["origin"]["git_commit"] == "c0ffee"
    history = [values_of(each.history.item) for each in (*first, *second) if each.HasField("history")]
    losses = [(row["step"], row["train/loss"]) for row in history if "train/loss" in row]
    assert losses == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 1 / 3)]
    assert [(row["step"], row["evaluate/ap"]) for row in history if "evaluate/ap" in row] == [(3, 0.5)]
    summary: dict[str, Any] = {}
    for each in second:
        if each.HasField("summary"):
            summary |= values_of(each.summary.update)
    assert (summary["best/ap"], summary["status"]) == (0.5, "completed")
    assert summary["weights"].endswith("00000003/weights.safetensors")


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.trackers.reports import WrittenRun
from tests.training.trackers.test_wandb import track

run, callbacks = WrittenRun(Path(sys.argv[1])), track()
run.start(callbacks)
for step in range(1, 41):
    run.step(callbacks, step)
run.scores(callbacks, 40, ap=0.5)  # sends all steps
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_step_is_missing_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    run, resumed = WrittenRun(tmp_path), track()  # the last step was saved
    run.start(resumed)
    run.step(resumed, 41)
    run.end(resumed)
    import_module("wandb").teardown()
    records = [
        each for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")) for each in read_records(path)
    ]
    history = [values_of(each.history.item) for each in records if each.HasField("history")]
    assert {row["step"] for row in history if "train/loss" in row} == set(range(1, 42))
    assert {row["step"] for row in history if "evaluate/ap" in row} == {40}
    assert json.loads((tmp_path / "trackers" / "wandb.json").read_text())["lines"]["train"] == 42


def test_a_missing_key_is_a_warning_and_no_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    import_module("wandb").teardown()  # it has read the variables before
    warnings: list[str] = []
    run = WrittenRun(tmp_path)
    callbacks = track(warnings)
    run.start(callbacks)
    run.step(callbacks, 1)
    assert warnings == [
        "wandb: the run cannot be recorded there (no API key; log in with `wandb login`, or set WANDB_MODE=offline); "
        "training goes on, it is tried again from time to time, and all numbers are in metrics.jsonl"
    ]
    import_module("wandb").teardown()
