"""Image files named by path, folder, pattern and list."""

from pathlib import Path

import pytest

from sniper.cli.images import find_image_files
from sniper.errors import ConfigError


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "deep/c.JPG", "notes.md"):
        (tmp_path / "photos" / name).touch()
    (tmp_path / "photos" / "folder.png").mkdir()
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfphotos/b.png\n\n photos/a.jpg\r\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["photos"], ["a.jpg", "b.png", "c.JPG"]),
        (["list.txt"], ["b.png", "a.jpg"]),
        (["photos/**/*.JPG", "photos/b.png"], ["c.JPG", "b.png"]),
        (["photos/b.png", "photos"], ["b.png", "a.jpg", "c.JPG"]),
        (["photos/**"], ["a.jpg", "b.png", "c.JPG"]),
        (["none.png"], ["none.png"]),  # refused when it is read
    ],
)
def test_folders_patterns_and_lists_are_expanded(
    photos: Path, arguments: list[str], names: list[str]
) -> None:
    assert [path.name for path in find_image_files(arguments)] == names


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", "an image file has an empty name"),
        ("photos/*.webp", r"photos/\*\.webp: no image is there"),
        ("empty", "empty: no image is there"),
        ("none.txt", "none.txt: cannot be read as a list of images"),
    ],
)
def test_arguments_without_an_image_are_refused(photos: Path, argument: str, message: str) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        find_image_files([argument])
