"""The data set, the experiment and the short run of the tests of commands."""

from tests.cli.conftest import trained_folder, trained_folder_once

__all__ = ["trained_folder", "trained_folder_once"]
