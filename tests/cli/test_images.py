"""Image files named by path, folder, pattern and list."""

import os
from pathlib import Path

import pytest
from PIL import Image

from sniper.cli.images import find_image_files
from sniper.errors import ConfigError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"P5 1 1 255\n\0")  # an image, whatever its suffix


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    touch(tmp_path / "photos", "b.png", "a.jpg", "deep/c.JPG", "notes.md")
    (tmp_path / "photos" / "folder.png").mkdir()
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfphotos/b.png\n\n photos/a.jpg\r\n")
    (tmp_path / "utf16.txt").write_text("photos/b.png\nphotos/a.jpg\n", encoding="utf-16")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["photos"], ["a.jpg", "b.png", "c.JPG"]),
        (["list.txt"], ["b.png", "a.jpg"]),
        (["utf16.txt"], ["b.png", "a.jpg"]),
        (["photos/**/*.JPG", "photos/b.png"], ["c.JPG", "b.png"]),
        (["photos/b.png", "photos"], ["b.png", "a.jpg", "c.JPG"]),
        (["photos/**"], ["a.jpg", "b.png", "c.JPG"]),
        (["**/deep/*"], ["c.JPG"]),
        (["pho*s/*.[jp]*g"], ["a.jpg", "b.png"]),
        (["p*/**/c.*"], ["c.JPG"]),
        (["~/photos/b.png", "$PHOTOS/a.jpg", "$PHOTOS/d*/*"], ["b.png", "a.jpg", "c.JPG"]),
    ],
)
def test_folders_patterns_and_lists_are_expanded(
    photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], names: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(photos))
    monkeypatch.setenv("PHOTOS", str(photos / "photos"))
    assert [path.name for path in find_image_files(arguments).images] == names


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", "an image file has an empty name"),
        ("photos/*.webp", r"photos/\*\.webp: no image is there"),
        ("photos/*.md", r"photos/\*\.md: no image is there; passed over 1 \.md"),
        ("empty", "empty: no image is there"),
        ("photo", r"photo: no such file or folder; did you mean photos\?"),
        ("photos/aa.jpg", r"photos/aa.jpg: no such file or folder; did you mean photos/a.jpg\?"),
        ("none/a.jpg", "none/a.jpg: no such file or folder$"),
        ("none.txt", r"none.txt: cannot be read as a list of images \(No such file"),
        ("pipe.txt", r"pipe.txt: cannot be read as a list of images \(a pipe, not a regular file\)"),
        ("note.txt", r"note.txt: is read as a list of images, .* no file of it is there, such as 'hello'"),
        ("binary.txt", r"binary.txt: cannot be read as a list of images \(it is not text\)"),
        ("$NONE/a", "the environment variable NONE is not defined"),
    ],
)
def test_arguments_without_an_image_are_refused(photos: Path, argument: str, message: str) -> None:
    (photos / "empty").mkdir()
    os.mkfifo(photos / "pipe.txt")
    (photos / "binary.txt").write_bytes(b"\0\1")
    (photos / "note.txt").write_text("hello\nworld\n")
    with pytest.raises(ConfigError, match=message):
        find_image_files([argument])


@pytest.mark.parametrize("argument", ["shots", "shots/**", "shots/*"])
def test_hidden_files_thumbnails_and_trash_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str
) -> None:
    hidden = (".DS_Store", "Thumbs.db", "desktop.ini", ".git/config", "@eaDir/a.txt")
    with_images = (
        "._a.jpg", ".Trash-1000/files/a.jpg", ".thumbnails/a.png", "@eaDir/a.jpg/thumb.jpg", "__MACOSX/._b.jpg",
        "$RECYCLE.BIN/a.jpg",
    )  # fmt: skip
    touch(tmp_path / "shots", "a.jpg", *hidden, *with_images)
    monkeypatch.chdir(tmp_path)
    found = find_image_files([argument])
    assert found.images == [Path("shots/a.jpg")]
    if argument != "shots/*":
        (warning,) = found.warnings
        assert warning.startswith(f"{argument}: passed over 6 hidden with images (shots/$RECYCLE.BIN, ")


def test_patterns_pass_over_thumbnails_and_trash_in_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a/b.jpg", "#recycle/c.jpg", "@eaDir/d.jpg", ".own/e.jpg", "@eaDir/f.txt")
    found = find_image_files([str(tmp_path / "*" / "*")])
    assert found.images == [tmp_path / "a" / "b.jpg"]
    listed = f"{tmp_path}/#recycle/c.jpg, {tmp_path}/@eaDir/d.jpg"
    assert found.warnings == [f"{tmp_path}/*/*: passed over 2 hidden with images ({listed})"]
    assert find_image_files([str(tmp_path / ".o*" / "*")]).images == [tmp_path / ".own" / "e.jpg"]
    assert find_image_files([str(tmp_path / "@eaDir" / "*.jpg")]).images == [tmp_path / "@eaDir" / "d.jpg"]


def test_a_targa_file_is_recognized_by_its_suffix(tmp_path: Path) -> None:
    for name in ("a.tga", "b.jpg", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "TGA")
    assert find_image_files([str(tmp_path)]).images == [tmp_path / "a.tga"]


def test_a_hidden_folder_that_is_named_is_searched(tmp_path: Path) -> None:
    touch(tmp_path / ".cache", "a.jpg")
    assert find_image_files([str(tmp_path / ".cache")]).images == [tmp_path / ".cache" / "a.jpg"]


def test_other_files_are_counted_by_kind(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.MP4", "c.mp4", "d.xml", "e.hei")
    (tmp_path / "README").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare", "JPEG")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    found = find_image_files([str(tmp_path)])
    assert [path.name for path in found.images] == ["a.jpg", "bare"]
    assert found.warnings == [
        f"{tmp_path}: passed over 1 .hei, 2 .mp4, 1 .xml, 2 broken links ({tmp_path}/link.png, {tmp_path}/loop.png), "
        f"1 pipes, sockets or devices ({tmp_path}/pipe.png), 1 without a suffix"
    ]


def test_the_package_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sniper.data.images.formats.image_suffixes", lambda: frozenset({".jpg"}))
    touch(tmp_path, "a.jpg", "b.heic")
    assert find_image_files([str(tmp_path)]).warnings == [
        f"{tmp_path}: passed over 1 .heic (pip install 'sniper-det[heic]')"
    ]


@pytest.mark.parametrize("argument", ["", "**", "**/*.jpg", "*/**/*.jpg", "**/**/**/*.jpg", "*/*/*.jpg"])
def test_links_in_a_circle_are_followed_once(tmp_path: Path, argument: str) -> None:
    touch(tmp_path, "shots/deep/a.jpg")
    for name in ("one", "two", "three"):
        (tmp_path / "shots" / "deep" / name).symlink_to("..")
        (tmp_path / "shots" / name).symlink_to(tmp_path)
    found = find_image_files([str(tmp_path / argument)])
    assert found.images == [tmp_path / "shots" / "deep" / "a.jpg"]


def test_a_folder_behind_a_link_is_searched(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/b.jpg", "shots/c.jpg")
    (tmp_path / "shots" / "a").symlink_to(tmp_path / "elsewhere")
    images = find_image_files([str(tmp_path / "shots")]).images
    assert images == [tmp_path / "shots" / "a" / "b.jpg", tmp_path / "shots" / "c.jpg"]


def test_names_of_any_bytes_are_found(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xb2\xe2.jpg")
    touch(tmp_path, name)
    (tmp_path / "list.txt").write_bytes(b"\xb2\xe2.jpg\n")
    assert find_image_files([str(tmp_path)]).images == [tmp_path / name]
    assert find_image_files([str(tmp_path / "list.txt")]).images == [tmp_path / name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        (warning,) = find_image_files([str(tmp_path)]).warnings
        assert warning.endswith(f"1 folders that cannot be read ({tmp_path}/closed)")
        with pytest.raises(
            ConfigError, match=r"closed: cannot be read \(Permission denied; check the permissions"
        ):
            find_image_files([str(tmp_path / "closed")])
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_folder_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    scan = os.scandir

    def fail(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("os.scandir", fail)
    assert find_image_files([str(tmp_path)]).warnings == [
        f"{tmp_path}: passed over 1 folders that cannot be read ({tmp_path}/closed)"
    ]
    with pytest.raises(
        ConfigError, match=r"closed: cannot be read \(Permission denied; check the permissions"
    ):
        find_image_files([str(tmp_path / "closed")])


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "page.png").write_bytes(b"<html>not found</html>")
    found = find_image_files([str(tmp_path)])
    assert found.images == [tmp_path / "a.jpg"]
    (line,) = found.warnings
    assert line.endswith(f"1 with the suffix but not the content of an image ({tmp_path / 'page.png'})")
