"""Paths of remote files."""

import pickle
import warnings
from pathlib import Path

import fsspec
import pytest

from sniper.files import expand_path, list_folder, match_remote, open_regular
from sniper.remote import RemotePath, is_remote, to_path


@pytest.fixture
def folder() -> RemotePath:
    """Return a folder of fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    for name in ("a.txt", "b.json", "images/1.jpg", "images/deep/2.jpg", "empty"):
        system.pipe(f"/root/{name}", b"" if name == "empty" else name.encode())
    path = to_path("memory://root")
    assert is_remote(path)
    return path


def test_a_path_is_the_url_whatever_it_is_joined_to() -> None:
    path = expand_path("s3://bucket/images")
    assert str(path / "a b.jpg") == "s3://bucket/images/a b.jpg"
    assert (path / "a.jpg").parent == path
    assert (path / "a.jpg").relative_to(path).as_posix() == "a.jpg"
    assert str(Path("/local") / path) == "s3://bucket/images"
    assert str((Path("local") / path).absolute()) == str(path.resolve()) == "s3://bucket/images"
    assert pickle.loads(pickle.dumps(path)) == path
    assert {path: 1}[to_path("s3://bucket/images/")] == 1
    assert path.is_absolute()


@pytest.mark.parametrize("name", ["/etc/passwd", "https://other/a.jpg", "//host/a"])
def test_a_name_below_a_remote_folder_stays_below_it(name: str) -> None:
    root = to_path("s3://bucket/images")
    assert str(root / name).startswith("s3://bucket/images/")


def test_files_and_folders_are_found(folder: RemotePath) -> None:
    assert list_folder(folder) == (["images"], ["a.txt", "b.json", "empty"])
    assert folder.is_dir()
    assert (folder / "images").is_dir()
    assert not (folder / "images").is_file()
    assert (folder / "a.txt").is_file()
    assert not (folder / "a.txt").is_dir()
    assert not (folder / "none").exists()
    assert [path.name for path in folder.glob("*.txt")] == ["a.txt"]
    assert list((folder / "none").glob("*")) == []
    assert [path.name for path in folder.walk_files()] == ["a.txt", "b.json", "empty", "1.jpg", "2.jpg"]


@pytest.mark.parametrize(
    ("pattern", "names"), [("*/*.jpg", ["1.jpg"]), ("**/*.jpg", ["1.jpg", "2.jpg"]), ("i*/d*", ["deep"])]
)
def test_patterns_match_remote_files(folder: RemotePath, pattern: str, names: list[str]) -> None:
    assert [path.name for path in match_remote(folder / pattern)] == names


def test_content_is_read(folder: RemotePath) -> None:
    for name, content in (("a.txt", b"a.txt"), ("empty", b"")):
        with open_regular(folder / name) as file:
            assert file.read() == content
    with pytest.raises(FileNotFoundError, match="does not exist") as caught:
        open_regular(folder / "none")
    assert caught.value.filename == "memory://root/none"


def test_a_file_that_is_not_there_is_not_asked_for_again(folder: RemotePath) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FileNotFoundError, match="does not exist") as caught:
            (folder / "none").open_binary(is_fixed=True)
    assert caught.value.filename == "memory://root/none"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/a", "needs a package: pip install 'gcsfs'"),
        ("nothing://bucket/a", "nothing:// is no protocol that fsspec knows"),
    ],
)
def test_a_server_that_cannot_be_asked_is_explained(url: str, message: str) -> None:
    if url.startswith("gs:") and "gcsfs" in __import__("sys").modules:
        pytest.skip("gcsfs is installed")
    with pytest.raises(OSError, match=message):
        open_regular(to_path(url))
