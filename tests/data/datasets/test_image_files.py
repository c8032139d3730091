"""Where image files are looked for, which names are corrected, and which files may be opened."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sniper.data.datasets import Dataset, load_dataset
from sniper.data.datasets.image_files import find_path_problem, locate_image_files
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError
from tests.data.datasets.small import COCO, changed, image, load

NAMES = ["a.jpg", "sub/b.jpg"]


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize(
    ("annotations", "root"),
    [
        ("d/a.json", "d/images"),
        ("d/a.json", "d"),
        ("d/annotations/a.json", "d"),
        ("d/annotations/a.json", "d/images"),
        ("d/annotations/val.json", "d/val"),
        ("d/annotations/instances_val2017.json", "d/val2017"),
        ("d/annotations/instances_val2017.json", "d/images/val2017"),
        ("d/train.json", "d/images/train"),
        ("d/train.json", "d/train"),
        ("d/labels.json", "d/data"),
        ("d/a.json", "d/JPEGImages"),
        ("d/annotations/a.json", "d/img"),
        ("d/a.json", "d/images/batch"),
    ],
)
def test_the_image_root_is_the_one_with_the_files(
    tmp_path: Path, annotations: str, root: str, is_complete: bool
) -> None:
    write(tmp_path / root, *NAMES)
    (tmp_path / annotations).parent.mkdir(exist_ok=True)
    (tmp_path / "d" / "images").mkdir(exist_ok=True)
    files = locate_image_files(tmp_path / annotations, NAMES, image_root=None, is_complete=is_complete)
    assert (files.root, files.warnings, files.counts) == (tmp_path / root, (), {})
    assert list(files.names) == NAMES


def test_names_that_start_with_the_folder_of_the_images_are_found(tmp_path: Path) -> None:
    write(tmp_path, "images/a.jpg")
    files = locate_image_files(tmp_path / "a.json", ["images/a.jpg"], image_root=None)
    assert (files.root, list(files.names), files.warnings) == (tmp_path, ["images/a.jpg"], ())


def test_a_relative_path_of_the_annotations_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "d/a.jpg")
    (tmp_path / "d" / "labels").mkdir()
    monkeypatch.chdir(tmp_path / "d" / "labels")
    assert locate_image_files(Path("a.json"), ["a.jpg"], image_root=None).root == tmp_path / "d"


def test_files_in_two_image_roots_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "images", *NAMES)
    write(tmp_path, *NAMES)
    (warning,) = locate_image_files(tmp_path / "a.json", NAMES, image_root=None).warnings
    assert (
        warning
        == f"the image files are in {tmp_path / 'images'} and in {tmp_path}; the former are used (--images)"
    )


def test_one_folder_under_two_names_is_one_image_root(tmp_path: Path) -> None:
    write(tmp_path, *NAMES)
    (tmp_path / "images").symlink_to(".")
    assert locate_image_files(tmp_path / "a.json", NAMES, image_root=None).warnings == ()


def test_the_image_root_with_most_files_is_used_and_the_others_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "images", "a.jpg")
    write(tmp_path, "a.jpg", "b.jpg")
    files = locate_image_files(tmp_path / "a.json", ["a.jpg", "b.jpg", "c.jpg"], image_root=None)
    assert files.root == tmp_path
    assert files.counts == {tmp_path / "images": 1, tmp_path: 2, tmp_path.parent: 0}


def test_an_image_root_that_is_given_is_the_only_one(tmp_path: Path) -> None:
    write(tmp_path / "images", *NAMES)
    (tmp_path / "other").mkdir()
    files = locate_image_files(tmp_path / "a.json", NAMES, image_root=tmp_path / "other")
    assert files.root == tmp_path / "other"
    assert files.counts[tmp_path / "other"] == 0
    assert files.counts[tmp_path / "images"] == 2


@pytest.mark.parametrize(
    ("name", "file", "kind"),
    [
        (r"images\a.jpg", "images/a.jpg", "backslashes"),
        (r"sub\deep\a.jpg", "sub/deep/a.jpg", "backslashes"),
        ("my%20photo.jpg", "my photo.jpg", "URL encoding"),
        ("file:///data/a.jpg", "a.jpg", "URL encoding and the folder before it"),
        ("/data/local-files/?d=sub/a.jpg", "sub/a.jpg", "URL encoding"),
        ("A.JPG", "a.jpg", "upper and lower case"),
        ("Sub/a.jpg", "sub/a.jpg", "upper and lower case"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg", "Unicode form"),
        ("cafe\u0301.jpg", "caf\u00e9.jpg", "Unicode form"),
        ("CAFE\u0301.jpg", "caf\u00e9.jpg", "upper and lower case"),
        ("a.jpg ", "a.jpg", "blanks"),
        ("a", "a.jpg", "the suffix"),
        ("0a1b2c3d-a.jpg", "a.jpg", "the prefix of an upload"),
        ("/home/me/set/sub/a.jpg", "sub/a.jpg", "the folder before it"),
        ("../a.jpg", "a.jpg", "the folder before it"),
        ("images/v1/patch0/a.jpg", "patch0/a.jpg", "the folder before it"),
        ("images/a.jpg", "a.jpg", "the folder before it"),
        ("s3://bucket/set/images/a.jpg", "images/a.jpg", "URL encoding and the folder before it"),
        ("https://host/my%20set/a%20b.jpg?key=1&x=a.jpg", "a b.jpg", "URL encoding and the folder before it"),
        (r"train\a.jpg", "a.jpg", "backslashes and the folder before it"),
        (r"C:\Users\me\a.jpg", "a.jpg", "backslashes and the folder before it"),
    ],
)
def test_a_name_that_stands_for_one_file_is_corrected_with_a_warning(
    tmp_path: Path, name: str, file: str, kind: str
) -> None:
    write(tmp_path / "root", file)
    files = locate_image_files(tmp_path / "a.json", [name], image_root=tmp_path / "root")
    assert list(files.names) == [file]
    assert files.is_corrected
    assert files.warnings == (
        f"1 file name differs from the image file in {kind}, corrected ({name} is {file})",
    )


@pytest.mark.parametrize("name", ["./a.jpg", "sub/../a.jpg", "sub//b.jpg", "100%25.jpg", r"back\slash.jpg"])
def test_a_name_that_works_as_it_is_is_kept(tmp_path: Path, name: str) -> None:
    write(tmp_path, "a.jpg", "sub/b.jpg", "100%25.jpg", "100%.jpg", r"back\slash.jpg", "back/slash.jpg")
    files = locate_image_files(tmp_path / "a.json", [name], image_root=tmp_path)
    assert (list(files.names), files.warnings) == ([name], ())


def test_an_absolute_name_below_the_image_root_is_accepted(tmp_path: Path) -> None:
    write(tmp_path, *NAMES)
    names = [str(tmp_path / name) for name in NAMES]
    files = locate_image_files(tmp_path / "a.json", names, image_root=tmp_path)
    assert (list(files.names), files.warnings) == (NAMES, ())


@pytest.mark.parametrize(
    ("names", "existing", "located"),
    [
        (["A.jpg"], ["a.jpg", "a.JPG"], ["A.jpg"]),  # several files
        (["A.jpg", "a.jpg"], ["a.jpg"], ["A.jpg", "a.jpg"]),  # another image has the file
        (["/x/a.jpg", "/y/a.jpg"], ["a.jpg"], ["/x/a.jpg", "/y/a.jpg"]),
        (["a"], ["a.jpg", "a.png"], ["a"]),
        (["a"], ["a.txt"], ["a"]),
        (["a.jpg"], ["a.png"], ["a.jpg"]),
        (["x/a.jpg"], ["a.jpg", "x/b.jpg"], ["x/a.jpg"]),
        (["x/a.jpg", "y/a.jpg"], ["a.jpg"], ["x/a.jpg", "y/a.jpg"]),
        (["x/y/a.jpg", "x/z/a.jpg"], ["a.jpg"], ["x/y/a.jpg", "x/z/a.jpg"]),
        (["A"], ["a/b.jpg"], ["A"]),  # a folder
    ],
)
def test_a_name_that_may_stand_for_another_file_is_not_corrected(
    tmp_path: Path, names: list[str], existing: list[str], located: list[str]
) -> None:
    write(tmp_path, *existing)
    assert list(locate_image_files(tmp_path / "a.json", names, image_root=tmp_path).names) == located


def test_corrections_are_counted_by_kind_with_examples(tmp_path: Path) -> None:
    write(tmp_path, *(f"{index}.jpg" for index in range(5)), "b/c.jpg")
    names = [*(f"{index}.JPG" for index in range(5)), r"b\c.jpg"]
    files = locate_image_files(tmp_path / "a.json", names, image_root=tmp_path)
    assert files.warnings == (
        "5 file names differ from the image file in upper and lower case, corrected "
        "(0.JPG is 0.jpg; 1.JPG is 1.jpg; 2.JPG is 2.jpg; and 2 more)",
        r"1 file name differs from the image file in backslashes, corrected (b\c.jpg is b/c.jpg)",
    )


def test_corrected_names_are_opened_and_the_data_set_keeps_those_of_the_file(folder: Path) -> None:
    dataset = load(folder, changed(image(file_name=r".\B.PNG")))
    assert dataset[2].path == folder / "images" / "b.png"
    assert dataset[2].file_name == r".\B.PNG"
    assert dataset.digest == load(folder, changed(image(file_name=r".\B.PNG")), has_images=False).digest
    assert len(dataset.warnings) == 1


def refusal(folder: Path, content: Any = COCO, **options: Any) -> str:
    with pytest.raises(AnnotationError) as refused:
        load(folder, content, **options)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bb.png", "; there is b.png"),
        ("b.jpg", "; there is b.png"),
        ("sob/a.png", "; there is sub"),
        ("sub/b.png", "; there is sub/a.png"),
        ("/home/me/x.png", "leaves the image root"),
    ],
)
def test_an_absent_file_is_reported_with_the_nearest_name_and_the_image_roots(
    folder: Path, name: str, hint: str
) -> None:
    message = refusal(folder, changed(image(file_name=name)))
    assert f"image 20: {name} " in message
    assert hint in message
    assert f"files by image root (--images): 2 in {folder / 'images'}, 0 in {folder}" in message


def test_image_roots_are_listed_once_for_many_absent_files(folder: Path) -> None:
    for path in (folder / "images").rglob("*.png"):
        path.unlink()
    assert refusal(folder).count("files by image root") == 1


def test_names_that_leave_the_image_root_are_refused_where_files_are_needed(folder: Path) -> None:
    (folder / "b.png").write_bytes((folder / "images" / "b.png").read_bytes())
    content = changed(image(file_name="sub/../../c/b.png"))
    (folder / "images" / "b.png").unlink()
    assert f"sub/../../c/b.png leaves the image root {folder / 'images'}" in refusal(folder, content)
    assert len(load(folder, content, has_images=False)) == 3


# Links and other files


def link_outside(folder: Path) -> None:
    (folder / "images" / "b.png").rename(folder / "b.png")
    (folder / "images" / "b.png").symlink_to(folder / "b.png")


def test_a_link_that_leaves_the_image_root_is_opened_only_if_that_is_allowed(folder: Path) -> None:
    link_outside(folder)
    assert "outside the image root" in refusal(folder)
    assert "data.follow_links: true or --follow-links allows it" in refusal(folder)
    assert load(folder, data=DataSpec(follow_links=True))[2].follow_links


def test_a_folder_that_is_a_link_outside_the_image_root_needs_the_setting_too(folder: Path) -> None:
    (folder / "images" / "sub").rename(folder / "elsewhere")
    (folder / "images" / "sub").symlink_to(folder / "elsewhere")
    assert f"sub/a.png is a link to {folder / 'elsewhere' / 'a.png'}, outside" in refusal(folder)
    assert len(load(folder, data=DataSpec(follow_links=True))) == 3


def break_link(path: Path) -> None:
    path.symlink_to("nowhere.png")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def bind_socket(path: Path) -> None:
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (break_link, "is a broken link, to nowhere.png"),
        (link_to_itself, "cannot be read (Too many levels of symbolic links; links lead in a circle"),
        (os.mkfifo, "is a pipe, not a regular file"),
        (bind_socket, "is a socket, not a regular file"),
        (link_to_device, "is a device, not a regular file"),
        (Path.mkdir, "is a folder, expected an image file"),
    ],
)
def test_what_is_no_regular_file_is_named_and_never_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], problem: str
) -> None:
    monkeypatch.chdir(folder)
    path = folder / "images" / "b.png"
    path.unlink()
    make(path)
    assert f"image 20: b.png {problem}" in refusal(folder, data=DataSpec(follow_links=True))
    skipping = load(folder, data=DataSpec(follow_links=True, on_bad_image="skip"))
    assert f"b.png {problem}" in skipping.warnings[-1]


@pytest.mark.parametrize(
    ("name", "is_outside"),
    [("a.jpg", False), ("../x.jpg", True), ("/etc/x.jpg", True), ("sub/../b.jpg", False)],
)
def test_a_path_outside_the_root_is_a_problem_before_it_is_looked_at(
    tmp_path: Path, name: str, is_outside: bool
) -> None:
    problem = find_path_problem(tmp_path / name, tmp_path, follow_links=True)
    assert problem is not None
    assert problem.startswith("leaves the image root" if is_outside else "does not exist")


def test_a_selected_data_set_keeps_its_paths(folder: Path) -> None:
    import numpy as np

    dataset: Dataset = load(folder, changed(image(file_name="B.png")), data=DataSpec(follow_links=True))
    selected = dataset.select(np.array([2, 0]))
    assert [record.path for record in selected] == [folder / "images" / "b.png", folder / "images" / "c.png"]
    assert selected.follow_links


def test_a_pattern_of_a_yolo_data_set_follows_links_once(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind / "deep").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "deep" / "a.jpg")
    (tmp_path / "labels" / "deep" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    for name in ("one", "two", "three"):
        (tmp_path / "images" / "deep" / name).symlink_to("..")
    (tmp_path / "data.yaml").write_text("train: images/**/*.jpg\nnames: [cat]\n")
    assert [record.path.name for record in load_dataset(tmp_path / "data.yaml")] == ["a.jpg"]


def test_other_folders_are_tried_only_without_a_usual_one(tmp_path: Path) -> None:
    write(tmp_path / "data", *NAMES)
    write(tmp_path / ".trash", *NAMES)
    write(tmp_path / "images", NAMES[0])
    files = locate_image_files(tmp_path / "a.json", NAMES, image_root=None)
    assert (files.root, files.warnings) == (tmp_path / "data", ())
    write(tmp_path / "images", *NAMES)
    assert locate_image_files(tmp_path / "a.json", NAMES, image_root=None).root == tmp_path / "images"


def test_files_in_two_other_folders_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "raw", *NAMES)
    write(tmp_path / "small", *NAMES)
    (warning,) = locate_image_files(tmp_path / "a.json", NAMES, image_root=None).warnings
    assert f"are in {tmp_path / 'raw'} and in {tmp_path / 'small'}; the former are used" in warning


def test_leading_folders_without_which_names_are_distinct_are_dropped(tmp_path: Path) -> None:
    write(tmp_path / "train", "patch0/a.jpg", "patch16/a.jpg")
    names = ["images/v1/patch0/a.jpg", "images/v2/patch16/a.jpg"]
    files = locate_image_files(tmp_path / "objects365_train.json", names, image_root=None)
    assert (files.root, list(files.names)) == (tmp_path / "train", ["patch0/a.jpg", "patch16/a.jpg"])


def test_names_in_a_folder_of_annotations_are_corrected(tmp_path: Path) -> None:
    for split, name in (("train", r"C:\set\a.jpg"), ("valid", "../../upload/3/0a1b2c3d-b.jpg")):
        (tmp_path / split).mkdir()
        content = changed(lambda coco: None)
        content["images"] = [{"id": 10, "file_name": name, "width": 20, "height": 50}]
        content["annotations"] = []
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
    Image.new("RGB", (20, 50)).save(tmp_path / "train" / "a.jpg")
    Image.new("RGB", (20, 50)).save(tmp_path / "valid" / "0a1b2c3d-b.jpg")
    dataset = load_dataset(tmp_path, split="all")
    assert [record.path for record in dataset] == [
        tmp_path / "train" / "a.jpg",
        tmp_path / "valid" / "0a1b2c3d-b.jpg",
    ]
    assert "backslashes and the folder before it, corrected" in dataset.warnings[0]
    assert "0a1b2c3d-b.jpg is 0a1b2c3d-b.jpg" in dataset.warnings[1]
    (tmp_path / "valid" / "0a1b2c3d-b.jpg").unlink()
    with pytest.raises(
        AnnotationError, match=r"upload/3/0a1b2c3d-b\.jpg does not exist, expected .*/valid/upload"
    ):
        load_dataset(tmp_path, split="val")


def test_thumbnails_beside_images_of_yolo_are_passed_over(tmp_path: Path) -> None:
    for name in ("images/a.jpg", "images/@eaDir/a.jpg/thumb.jpg", "images/#recycle/b.jpg", "images/._a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 50)).save(tmp_path / name)
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")
    assert load_dataset(tmp_path).file_names.tolist() == ["images/a.jpg"]
