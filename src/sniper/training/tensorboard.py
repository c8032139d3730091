"""Metrics for TensorBoard, in addition to the run's own file."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sniper.errors import ConfigError
from sniper.files import naming_path


def check_tensorboard() -> None:
    """Check that TensorBoard is installed.

    Raises:
        ConfigError: if it is not.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "train.tensorboard: TensorBoard is not installed; pip install 'sniper-det[tensorboard]'"
        ) from error


class TensorBoardLogger:
    """Writes metrics as TensorBoard event files.

    Args:
        folder: of the event files.
        step: that the run continues from; TensorBoard hides what was written for later steps.

    Raises:
        ConfigError: if TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with naming_path(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with naming_path(self._folder):
            self._writer.close()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Write the numbers of one line of the metrics, grouped by stage."""
        with naming_path(self._folder):
            for name, value in entry.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(f"{entry['stage']}/{name}", value, entry["step"])
