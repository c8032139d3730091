"""Metrics as event files of TensorBoard, in the folder of the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sniper.files import naming_path
from sniper.training.callbacks import EndReport, StartReport
from sniper.training.trackers.tracking import Entry, numbers_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def build_service() -> "TensorBoard":
    """Return the service."""
    return TensorBoard()


class TensorBoard:
    """Writes to `tensorboard` in the folder of the run, and in that of its RPN stage."""

    name = "tensorboard"
    num_unsure = 0

    def __init__(self) -> None:
        self._folder = Path()
        self._writers: dict[str, SummaryWriter] = {}

    def open(self, start: StartReport, state: Mapping[str, str]) -> tuple[dict[str, str], str]:
        """Write to new event files."""
        self._folder, self._writers = start.folder, {}
        return {}, f"event files; to see them: tensorboard --logdir {start.folder}"

    def write(self, part: str, entries: Sequence[Entry], *, after: int) -> None:
        """Write lines of the metrics, and flush them; TensorBoard hides what was written for steps after `after`."""
        from torch.utils.tensorboard import SummaryWriter

        folder = (self._folder if part == "train" else self._folder / part) / "tensorboard"
        with naming_path(folder):
            writer = self._writers.get(part)
            if writer is None:
                writer = self._writers[part] = SummaryWriter(str(folder), purge_step=after + 1)
            for entry in entries:
                for name, value in numbers_of(entry, part).items():
                    writer.add_scalar(name, value, entry["step"])
            writer.flush()

    def close(self, end: EndReport) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()
