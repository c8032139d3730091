"""A service has every line of the metrics, whatever happens to the training, and never ends it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.training.callbacks import Callbacks, EndReport, StartReport
from sniper.training.trackers.tracking import SECONDS_BETWEEN, Entry, Service, Tracking, numbers_of
from tests.training.trackers.reports import WrittenRun


class Store:
    """A service that keeps what it is sent, and may fail."""

    name = "store"

    def __init__(self, num_unsure: int = 0) -> None:
        self.num_unsure = num_unsure
        self.num_kept = 0  # lines of earlier trainings
        self.written: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.sent: list[list[int]] = []  # the steps of each call
        self.states: list[dict[str, str]] = []
        self.ends: list[EndReport] = []
        self.problem: Exception | None = None
        self.num_calls = 0

    def open(self, start: StartReport, state: Mapping[str, str]) -> tuple[dict[str, str], str]:
        self._fail()
        self.states.append(dict(state))
        self.num_kept = len(self.written["train"])
        return {"id": state.get("id", "7")}, "somewhere"

    def write(self, part: str, entries: Sequence[Entry], *, after: int) -> None:
        self._fail()
        kept = [entry for entry in self.written[part] if entry["step"] <= after]
        self.written[part] = [*kept, *map(dict, entries)]
        if part == "train":
            self.num_kept = min(self.num_kept, len(kept))
        self.sent.append([entry["step"] for entry in entries])

    def close(self, end: EndReport) -> None:
        self._fail()
        self.ends.append(end)

    def lose(self) -> None:
        """Lose what it may lose when a training is killed."""
        lines = self.written["train"]
        self.written["train"] = lines[: max(self.num_kept, len(lines) - self.num_unsure)]

    def _fail(self) -> None:
        self.num_calls += 1
        if self.problem is not None:
            raise self.problem


class Training:
    """A process that trains a run and tracks it with a store."""

    def __init__(self, folder: Path, store: Store) -> None:
        assert isinstance(store, Service)
        self.run = WrittenRun(folder)
        self.now = 1000.0
        self.notices: list[str] = []
        self.warnings: list[str] = []
        tracking = Tracking(
            store, on_notice=self.notices.append, on_warning=self.warnings.append, clock=lambda: self.now
        )
        self.callbacks = Callbacks.of([Callbacks(), tracking])
        self.run.start(self.callbacks)

    def steps(self, *numbers: int, seconds: float = 0.0) -> None:
        for number in numbers:
            self.now += seconds
            self.run.step(self.callbacks, number)


def test_steps_are_sent_from_time_to_time_and_at_the_end(tmp_path: Path) -> None:
    store = Store()
    training = Training(tmp_path, store)
    training.steps(1, 2, 3)
    assert store.sent == [[1]]
    training.now += SECONDS_BETWEEN
    training.steps(4, 5)
    assert store.sent == [[1], [2, 3, 4]]
    training.run.end(training.callbacks)
    assert store.sent == [[1], [2, 3, 4], [5]]
    assert [end.status for end in store.ends] == ["completed"]
    assert training.notices == ["store: somewhere"]
    assert training.warnings == []


def test_scores_are_sent_at_once(tmp_path: Path) -> None:
    store = Store()
    training = Training(tmp_path, store)
    training.steps(1, 2)
    training.run.scores(training.callbacks, 2, ap=0.5)
    training.run.scores(training.callbacks, 1, ap=0.4, is_final=True)
    assert store.written["train"] == training.run.lines()
    assert [entry["stage"] for entry in store.written["train"]] == ["train", "train", "evaluate", "final"]


def test_lines_that_a_kill_kept_back_are_sent_by_the_resumed_training(tmp_path: Path) -> None:
    store = Store()
    Training(tmp_path, store).steps(1, 2, 3)  # only the first is sent, the checkpoint is of step 3
    resumed = Training(tmp_path, store)
    resumed.steps(4)
    assert store.sent == [[1], [2, 3, 4]]
    assert store.states == [{}, {"id": "7"}]


def test_steps_that_are_made_again_are_sent_again(tmp_path: Path) -> None:
    store = Store()
    Training(tmp_path, store).steps(1, 2, 3, seconds=SECONDS_BETWEEN)
    WrittenRun(tmp_path).cut(1)
    Training(tmp_path, store).steps(2)
    assert store.sent == [[1], [2], [3], [2]]
    assert [entry["step"] for entry in store.written["train"]] == [
        1,
        2,
    ]  # the store was told what is obsolete


def test_the_stage_of_the_rpn_is_sent_to_its_end(tmp_path: Path) -> None:
    store = Store()
    training = Training(tmp_path, store)
    for number in (1, 2, 3):
        training.run.step(training.callbacks, number, part="rpn")
    assert [entry["step"] for entry in store.written["rpn"]] == [1]
    training.now += SECONDS_BETWEEN
    training.run.log({"stage": "mine", "step": 0, "images": 4})
    training.steps(1)
    assert store.written["rpn"] == training.run.lines("rpn")
    assert [entry["stage"] for entry in store.written["train"]] == ["mine", "train"]
    Training(tmp_path, store).steps(2)
    assert store.written["rpn"] == training.run.lines("rpn")


def test_a_failing_service_is_named_once_and_tried_again_after_pauses(tmp_path: Path) -> None:
    store = Store()
    training = Training(tmp_path, store)
    training.steps(1)
    store.problem = OSError(28, "No space left on device")
    training.steps(2, seconds=SECONDS_BETWEEN)
    num_calls = store.num_calls
    training.steps(3, 4, seconds=25.0)
    assert store.num_calls == num_calls
    training.steps(5, seconds=25.0)  # after a minute; then after two
    assert store.num_calls == num_calls + 1
    training.steps(6, seconds=100.0)
    assert store.num_calls == num_calls + 1
    store.problem = None
    training.steps(7, seconds=25.0)
    assert store.written["train"] == training.run.lines()
    assert len(training.warnings) == 1
    assert (
        "store: the run cannot be recorded there ([Errno 28] No space left on device)" in training.warnings[0]
    )
    assert training.notices == ["store: somewhere", "store: works again, and has what it had missed"]
    assert store.states == [{}, {"id": "7"}]


def test_a_service_that_is_down_at_the_start_gets_everything_at_the_end(tmp_path: Path) -> None:
    store = Store()
    store.problem = ConnectionError("http://me:secret@host: refused")
    training = Training(tmp_path, store)
    training.steps(1, 2, seconds=SECONDS_BETWEEN)
    store.problem = None
    training.run.end(training.callbacks)
    assert store.written["train"] == training.run.lines()
    assert len(store.ends) == 1
    (warning,) = training.warnings
    assert "(http://...@host: refused)" in warning


def test_a_service_that_stays_down_does_not_disturb_the_end(tmp_path: Path) -> None:
    store = Store()
    store.problem = ConnectionError()
    training = Training(tmp_path, store)
    training.steps(1)
    training.run.end(training.callbacks)
    assert len(training.warnings) == 1
    assert "(ConnectionError)" in training.warnings[0]
    assert store.ends == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"state"', "trackers/store.json: is not JSON"),
        ('{"state": 3, "lines": {}}', "store.json: Expected `object`"),
    ],
)
def test_a_damaged_state_is_named_and_kept(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "trackers/store.json"
    path.parent.mkdir()
    path.write_text(text)
    store = Store()
    training = Training(tmp_path, store)
    training.steps(1, seconds=100)
    training.run.end(training.callbacks)
    (warning,) = training.warnings
    assert reason in warning
    assert store.num_calls == 0
    assert path.read_text() == text


def test_a_training_that_fails_before_its_start_is_not_tracked() -> None:
    store = Store()
    tracking = Tracking(store, on_notice=print, on_warning=print)
    WrittenRun(Path("none")).end(Callbacks.of([tracking]))
    assert store.num_calls == 0


@settings(max_examples=40)  # each writes dozens of files
@given(
    st.lists(  # processes that are killed: seconds before each step, and steps of the end that have no checkpoint
        st.tuples(st.lists(st.sampled_from([0.0, 2.0, 6.0]), max_size=8), st.integers(0, 3)), max_size=5
    ),
    st.integers(0, 3),
)
def test_a_service_has_the_lines_of_the_run_after_any_kills(
    processes: list[tuple[list[float], int]], num_unsure: int
) -> None:
    with TemporaryDirectory() as folder:
        store = Store(num_unsure)
        step = 0
        for pauses, num_lost in processes:
            training = Training(Path(folder), store)
            for pause in pauses:
                step += 1
                training.steps(step, seconds=pause)
            step = max(step - num_lost, 0)
            training.run.cut(step)
            store.lose()
        training = Training(Path(folder), store)
        training.steps(step + 1)
        training.run.end(training.callbacks)
        assert store.written["train"] == training.run.lines()
        assert [entry["step"] for entry in store.written["train"]] == list(range(1, step + 2))


def test_numbers_are_named_after_their_stage() -> None:
    entry = {"stage": "epoch", "step": 3, "loss": 0.5, "ap": None, "is_best": True, "milestones": [1.0]}
    assert numbers_of(entry, "train") == {"epoch/loss": 0.5}
    assert numbers_of(entry, "rpn") == {"rpn_epoch/loss": 0.5}
    assert numbers_of({"stage": "rpn", "step": 3, "loss": 0.5}, "rpn") == {"rpn/loss": 0.5}
