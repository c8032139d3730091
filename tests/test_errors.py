"""Errors of the operating system name the file and what to do about them; counts agree with their nouns."""

import errno
import os

import pytest

from sniper.errors import counted, describe_os_error, explain_os_error, explain_shared_memory


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space on its disk"),
        (errno.EDQUOT, "within your quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "a folder that can be written"),
        (errno.EACCES, "check the permissions"),
        (errno.EPERM, "check the owner"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "data.num_workers"),
        (errno.ENAMETOOLONG, "choose shorter names"),
        (errno.EIO, "the disk or the connection to it fails"),
        (errno.ESTALE, "mount it again"),
        (errno.ENOTDIR, "a part of the path is a file"),
        (errno.EISDIR, "name a file, not a folder"),
        (errno.ENOTEMPTY, "remove the folder"),
        (errno.EEXIST, "choose another name"),
        (errno.ELOOP, "links lead in a circle"),
        (errno.ENOMEM, "free memory"),
        (errno.EAGAIN, "ulimit -u"),
    ],
)
def test_an_error_of_the_system_names_file_reason_and_remedy(number: int, remedy: str) -> None:
    error = OSError(number, os.strerror(number), "runs/a/metrics.jsonl")
    message = explain_os_error(error)
    assert message.startswith(f"runs/a/metrics.jsonl: {os.strerror(number)}; ")
    assert remedy in message
    assert message == f"runs/a/metrics.jsonl: {describe_os_error(error)}"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), "a: No such file or directory"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "a file of a library, such as one in TMPDIR: No space",
        ),
        (OSError("encoder error -2 when writing image file"), "encoder error -2 when writing image file"),
        (OSError(errno.EACCES, "Permission denied", b"b\xff"), "b\udcff: Permission denied; check"),
        (OSError(), "OSError"),
    ],
)
def test_an_error_without_number_or_file_is_explained(error: OSError, message: str) -> None:
    assert message in explain_os_error(error)


@pytest.mark.parametrize(
    "text",
    [
        "unable to write to file </torch_77_3>: No space left on device (28)",
        "unable to open shared memory object </torch_77> in read-write mode: Too many open files (24)",
        "unable to mmap 1024 bytes from file </torch_77>: Cannot allocate memory (12)",
        "DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that dataloader's workers are out "
        "of shared memory.",
        "received 0 items of ancdata",
    ],
)
def test_a_lack_of_shared_memory_is_explained(text: str) -> None:
    message = explain_shared_memory(RuntimeError(text))
    assert message is not None
    assert message.startswith(f"/dev/shm: {text}; use fewer loader processes (data.num_workers")


def test_another_error_of_torch_is_not_explained() -> None:
    assert explain_shared_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 epochs"),
        (1, "1 epoch"),
        (1.0, "1 epoch"),
        (0.5, "0.5 epochs"),
        (4.763055671, "4.76306 epochs"),
        (1_234_567, "1,234,567 epochs"),
    ],
)
def test_a_count_is_in_the_singular_for_one_alone(number: float, text: str) -> None:
    assert counted(number, "epoch") == text
