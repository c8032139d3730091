"""Boxes of many images on disk: exact or compact, whatever process wrote them and however it ended."""

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.errors import DetectionsError, ProposalsError
from sniper.geometry import Detections
from sniper.inference.store import (
    BoxStore,
    Encoding,
    ExactEncoding,
    ImageList,
    ProposalEncoding,
    search_images,
)
from sniper.runs.processes import SINGLE_PROCESS, Processes

NUM_IMAGES = 7
WIDTHS = np.array([200, 30, 4000, 77, 128, 640, 1])
HEIGHTS = np.array([100, 60, 3000, 77, 1, 480, 50])
PROPOSALS = ProposalEncoding(widths=WIDTHS, heights=HEIGHTS)
EXACT = ExactEncoding(num_classes=80)


def start(
    folder: Path,
    encoding: Encoding = EXACT,
    *,
    existing: Literal["replace", "resume", "resume or replace"] = "resume",
    digest: str = "abc",
    weights: str = "w",
) -> BoxStore:
    return BoxStore.start(
        folder, encoding, images=images(digest), source={"weights": weights}, existing=existing
    )


def images(digest: str = "abc", *, count: int = NUM_IMAGES) -> ImageList:
    return ImageList(digest=digest, count=count, name="train.json")


def drawn(index: int, *, count: int | None = None) -> Detections:
    rng = np.random.default_rng(index)
    num_boxes = 3 * index if count is None else count
    low = rng.uniform(0, 0.8, (num_boxes, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.02, 0.2, low.shape)], axis=1)
    return Detections(
        boxes=boxes * np.array([WIDTHS[index], HEIGHTS[index]] * 2),
        scores=rng.uniform(0, 1, num_boxes),
        labels=rng.integers(0, 80, num_boxes),
    )


def write(store: BoxStore, indices: Sequence[int]) -> None:
    with store.new_part() as part:
        for index in indices:
            part.write(index, drawn(index))
    store.scan()


class Unsynchronised(Processes):
    """One of several processes, which waits for none of them."""

    def barrier(self) -> None:
        pass


def fill(
    store: BoxStore,
    processes: Processes = SINGLE_PROCESS,
    *,
    killed_after: int | None = None,
    searched: list[int] | None = None,
) -> None:
    def find(indices: Sequence[int]) -> Iterator[Detections]:
        if searched is not None:
            searched.extend(indices)
        return (drawn(index) for index in indices)

    def kill(num_done: int, num_images: int) -> None:
        if num_done == killed_after:
            raise KeyboardInterrupt

    search_images(store, find, processes=processes, on_progress=kill)


def assert_same(one: Detections | None, other: Detections) -> None:
    assert one is not None
    np.testing.assert_array_equal(one.boxes, other.boxes)
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.labels, other.labels)


def test_detections_come_back_exactly(tmp_path: Path) -> None:
    fill(start(tmp_path / "store"))
    store = BoxStore.open(tmp_path / "store", EXACT, images=images())
    for index in range(NUM_IMAGES):
        assert_same(store.read(index), drawn(index))
    assert store.counts.tolist() == [3 * index for index in range(NUM_IMAGES)]
    assert store.unreadable == []


def test_proposals_come_back_to_a_fraction_of_a_pixel(tmp_path: Path) -> None:
    fill(start(tmp_path / "store", PROPOSALS))
    store = BoxStore.open(tmp_path / "store", PROPOSALS, images=images())
    for index in range(NUM_IMAGES):
        proposals, expected = store.read(index), drawn(index)
        assert proposals is not None
        np.testing.assert_allclose(proposals.boxes, expected.boxes, atol=4000 / 65_535 / 2)
        np.testing.assert_allclose(proposals.scores, expected.scores, atol=1e-3)
        assert not proposals.labels.any()


@given(st.integers(0, NUM_IMAGES - 1), st.integers(0, 30))
def test_proposals_that_were_stored_once_come_back_exactly(index: int, count: int) -> None:
    once = PROPOSALS.decode(index, PROPOSALS.encode(index, drawn(index, count=count)))
    assert_same(PROPOSALS.decode(index, PROPOSALS.encode(index, once)), once)


def test_boxes_beyond_the_image_are_clipped_to_it() -> None:
    outside = Detections(
        boxes=np.array([[-5.0, -1.0, 300.0, 101.0]]), scores=np.array([1.0]), labels=np.array([0])
    )
    assert PROPOSALS.decode(0, PROPOSALS.encode(0, outside)).boxes.tolist() == [[0, 0, 200, 100]]


@pytest.mark.parametrize("encoding", [EXACT, PROPOSALS])
def test_an_unreadable_image_is_kept_apart_from_one_without_boxes(encoding: Encoding, tmp_path: Path) -> None:
    store = start(tmp_path / "store", encoding)
    with store.new_part() as part:
        part.write(0, Detections.empty())
        part.write(1, None)
    store.scan()
    assert store.unreadable == [1]
    assert store.read(1) is None
    assert len(store.read(0) or [1]) == 1  # empty detections are false
    assert store.counts[:2].tolist() == [0, 0]
    assert store.missing == [2, 3, 4, 5, 6]
    with pytest.raises(KeyError):
        store.read(2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    boxes, scores = np.array([[0.0, 0.0, 1.0, 1.0]]), np.array([0.5])
    with start(tmp_path / "store").new_part() as part:
        for broken in (boxes + bad, scores), (boxes, scores + bad):
            with pytest.raises(ValueError, match="image 3 are not finite"):
                part.write(3, Detections(boxes=broken[0], scores=broken[1], labels=np.array([0])))


def test_a_killed_process_loses_only_the_image_it_was_at(tmp_path: Path) -> None:
    store = start(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        fill(store, killed_after=3)
    resumed = start(tmp_path / "store")
    assert resumed.missing == [3, 4, 5, 6]
    fill(resumed)
    assert resumed.missing == []
    for index in range(NUM_IMAGES):
        assert_same(resumed.read(index), drawn(index))
    assert len(list((tmp_path / "store").glob("*.boxes"))) == 2
    fill(start(tmp_path / "store"))  # complete: nothing is searched, no part is added
    assert len(list((tmp_path / "store").glob("*.boxes"))) == 2


@pytest.mark.parametrize("encoding", [EXACT, PROPOSALS])
def test_a_part_cut_short_anywhere_keeps_its_whole_records(encoding: Encoding, tmp_path: Path) -> None:
    write(start(tmp_path / "store", encoding), [2, 0, 1])
    (part,) = (tmp_path / "store").glob("*.boxes")
    content = part.read_bytes()
    kept = []
    for length in range(len(content) + 1):
        part.write_bytes(content[:length])
        kept.append(NUM_IMAGES - len(start(tmp_path / "store", encoding).missing))
    assert kept == sorted(kept)
    assert set(kept) == {0, 1, 2, 3}
    assert kept[-2:] == [2, 3]


def test_a_damaged_record_is_never_taken_for_boxes(tmp_path: Path) -> None:
    write(start(tmp_path / "store"), range(NUM_IMAGES))
    (part,) = (tmp_path / "store").glob("*.boxes")
    content = part.read_bytes()
    header = len(content) - sum(12 + 44 * 3 * index for index in range(NUM_IMAGES))
    for position in np.random.default_rng(0).integers(header, len(content), 60):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        part.write_bytes(damaged)
        store = start(tmp_path / "store")
        assert store.missing
        for index in set(range(NUM_IMAGES)) - set(store.missing):
            assert_same(store.read(index), drawn(index))


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_missing_images(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    write(start(folder), [2])
    stores = [start(folder) for _ in range(count)]
    searched: list[list[int]] = []
    for rank, store in enumerate(stores):
        searched.append([])
        # Nothing is missing at the end of the last one alone: in truth, they end together.
        is_last = rank == count - 1
        with nullcontext() if is_last else pytest.raises(DetectionsError, match="images are missing"):
            fill(store, Unsynchronised(rank=rank, world_size=count), searched=searched[-1])
    assert searched == [[0, 1, 3, 4, 5, 6][rank::count] for rank in range(count)]
    assert len(list(folder.glob("*.boxes"))) == 1 + count


SEARCH_TOGETHER = """
import sys, torch
from pathlib import Path
import numpy as np
from sniper.geometry import Detections
from sniper.inference.store import BoxStore, ExactEncoding, ImageList, search_images
from sniper.runs.processes import Processes

detections = Detections(boxes=np.ones((2, 4)), scores=np.ones(2), labels=np.zeros(2, dtype=np.int64))
with Processes.from_environment().process_group(torch.device("cpu")) as processes:
    store = BoxStore.start(
        Path(sys.argv[1]),
        ExactEncoding(num_classes=80),
        images=ImageList(digest="abc", count=7, name="images"),
        source={"weights": "w"},
        existing="resume or replace",
        processes=processes,
    )
    share = []
    search_images(
        store,
        lambda indices: [detections] * len(indices),
        processes=processes,
        on_progress=lambda num_done, num_images: share.append(num_images),
    )
    assert store.counts.tolist() == [2] * 7
sys.stdout.write(f"{len(share)} ")  # one write, as the processes share the pipe
"""


@pytest.mark.processes
def test_two_processes_fill_one_store(tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = tmp_path / "search.py"
    script.write_text(SEARCH_TOGETHER)
    shares = []
    for _ in range(2):  # the second time, the store is complete
        done = subprocess.run(
            [*launcher, script, tmp_path / "store"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        shares.append(sorted(map(int, done.stdout.split())))
    assert shares == [[3, 4], [0, 0]]
    assert len(list((tmp_path / "store").glob("*.boxes"))) == 2


def test_progress_and_images_are_reported(tmp_path: Path) -> None:
    store = start(tmp_path / "store")
    write(store, [0, 1, 2])
    progress: list[tuple[int, int]] = []
    seen: list[int] = []
    search_images(
        store,
        lambda indices: (None if index == 5 else drawn(index) for index in indices),
        processes=SINGLE_PROCESS,
        on_progress=lambda *counts: progress.append(counts),
        on_image=lambda index, detections: seen.append(index),
    )
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen == [3, 4, 6]
    assert store.unreadable == [5]


@pytest.mark.parametrize(("digest", "weights"), [("other", "w"), ("abc", "other")])
def test_a_store_of_another_search_is_refused_or_replaced(digest: str, weights: str, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    fill(start(folder))
    with pytest.raises(DetectionsError, match=r"store: was written with other .*omit --resume"):
        start(folder, existing="resume", digest=digest, weights=weights)
    assert start(folder, existing="resume or replace").missing == []
    replaced = start(folder, existing="resume or replace", digest=digest, weights=weights)
    assert replaced.missing == list(range(NUM_IMAGES))
    assert [path.name for path in folder.iterdir()] == ["head.json"]


def test_an_empty_store_of_another_search_is_replaced(tmp_path: Path) -> None:
    store = start(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt), store.new_part():
        raise KeyboardInterrupt
    assert start(tmp_path / "store", weights="other").missing == list(range(NUM_IMAGES))


def test_a_store_is_replaced_where_nothing_is_to_be_resumed(tmp_path: Path) -> None:
    fill(start(tmp_path / "store"))
    assert start(tmp_path / "store", existing="replace").missing == list(range(NUM_IMAGES))


def test_a_part_of_another_store_is_refused(tmp_path: Path) -> None:
    write(start(tmp_path / "one"), [0])
    write(start(tmp_path / "other", weights="other"), [1])
    (tmp_path / "other" / "000.boxes").rename(tmp_path / "one" / "001.boxes")
    with pytest.raises(DetectionsError, match=r"001\.boxes: belongs to another store"):
        start(tmp_path / "one")


def append_record(store: BoxStore, index: int, rows: np.ndarray, *, count: int | None = None) -> None:
    """Append a record of any content with its right checksum."""
    count, content = len(rows) if count is None else count, rows.tobytes()
    checksum = zlib.crc32(content, zlib.crc32(struct.pack("<Ii", index, count)))
    with (store.folder / "000.boxes").open("ab") as file:
        file.write(struct.pack("<IiI", index, count, checksum) + content)


@pytest.mark.parametrize(("index", "count"), [(NUM_IMAGES, 0), (2**32 - 1, 0), (3, -2), (3, -(2**31))])
def test_a_record_of_no_image_is_refused(index: int, count: int, tmp_path: Path) -> None:
    store = start(tmp_path / "store")
    write(store, [0])
    append_record(store, index, np.zeros(0, dtype=EXACT.dtype), count=count)
    with pytest.raises(
        DetectionsError, match=rf"000\.boxes: the record of image {index} is damaged .*there are 7"
    ):
        start(tmp_path / "store")


@pytest.mark.parametrize(
    ("box", "score", "label", "message"),
    [
        ([0, 0, np.nan, 1], 0.5, 0, "a box or a score is not finite"),
        ([0, 0, 1, 1], np.inf, 0, "a box or a score is not finite"),
        ([0, 0, 1, 1], 0.5, 80, "labels are 80 to 80, expected 0 to 79"),
        ([0, 0, 1, 1], 0.5, -1, "labels are -1 to -1, expected 0 to 79"),
    ],
)
def test_detections_that_no_detector_has_are_refused(
    box: list[float], score: float, label: int, message: str, tmp_path: Path
) -> None:
    store = start(tmp_path / "store")
    write(store, [0])
    append_record(store, 3, np.array([(box, score, label)], dtype=EXACT.dtype))
    with pytest.raises(DetectionsError, match=rf"000\.boxes: the record of image 3 is damaged \({message}\)"):
        start(tmp_path / "store").read(3)


@pytest.mark.parametrize(("box", "score"), [([9, 0, 8, 1], 0.5), ([0, 9, 1, 8], 0.5), ([0, 0, 1, 1], np.nan)])
def test_proposals_that_no_rpn_has_are_refused(box: list[int], score: float, tmp_path: Path) -> None:
    store = start(tmp_path / "store", PROPOSALS)
    write(store, [0])
    append_record(store, 3, np.array([(box, score)], dtype=PROPOSALS.dtype))
    with pytest.raises(
        ProposalsError, match=r"the record of image 3 is damaged \(a score is no number, or a box"
    ):
        start(tmp_path / "store", PROPOSALS).read(3)


def test_a_part_that_is_cut_short_after_it_was_scanned_is_refused(tmp_path: Path) -> None:
    store = start(tmp_path / "store")
    write(store, [3])
    path = tmp_path / "store" / "000.boxes"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DetectionsError, match=r"the record of image 3 is damaged \(the file was cut short meanwhile"
    ):
        store.read(3)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "[" * 100_000,
        '{"version": "2"}',
        '{"version": 2, "kind": 7, "images": "abc"}',
        "\ud800",
        '{"version": 2}',
    ],
)
def test_a_damaged_head_is_refused(content: str, tmp_path: Path) -> None:
    fill(start(tmp_path / "store", PROPOSALS))
    (tmp_path / "store" / "head.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ProposalsError, match=r"store: contains no proposals \("):
        BoxStore.open(tmp_path / "store", PROPOSALS, images=images())
    with pytest.raises(ProposalsError, match="contains something else than proposals"):
        start(tmp_path / "store", PROPOSALS)


def test_an_incomplete_store_is_not_opened(tmp_path: Path) -> None:
    write(start(tmp_path / "store", PROPOSALS), [0, 1, 2])
    with pytest.raises(ProposalsError, match="4 of 7 images are missing; mine again to continue"):
        BoxStore.open(tmp_path / "store", PROPOSALS, images=images())


def test_a_store_of_other_images_or_another_version_is_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    fill(start(folder, PROPOSALS))
    with pytest.raises(ProposalsError, match=r"proposals of other images than those of train\.json"):
        BoxStore.open(folder, PROPOSALS, images=images("other"))
    with pytest.raises(DetectionsError, match=r"contains no detections \(it contains proposals\)"):
        BoxStore.open(folder, EXACT, images=images())
    with pytest.raises(ProposalsError, match="contains no proposals"):
        BoxStore.open(tmp_path / "none", PROPOSALS, images=images())
    (folder / "head.json").write_text(json.dumps({"version": 1, "digest": "abc", "source": {}}))
    with pytest.raises(ProposalsError, match="proposals of version 1, expected 2; mine again"):
        BoxStore.open(folder, PROPOSALS, images=images())
    (folder / "head.json").write_text("{}")
    with pytest.raises(ProposalsError, match="version: Field required"):
        BoxStore.open(folder, PROPOSALS, images=images())


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": ""},
        {"00000.npz": "an array of the user", "00001.npz": ""},
        {"head.json": '{"version": 2, "kind": "proposals", "images": "abc"}', "00000.npz": ""},
        {"head.json": '{"mine": 1}'},
        {"head.json": "[1, 2]"},
        {"head.json": '{"version": 2, "kind": "detections", "images": "abc"}'},
        {"head.json": '{"version": 2, "kind": "proposals", "images": "abc"}', "thesis.txt": ""},
    ],
)
def test_a_folder_of_something_else_is_left_alone(files: dict[str, str], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ProposalsError, match="something else than proposals; choose another folder"):
        start(tmp_path, PROPOSALS, existing="resume or replace")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_what_a_kill_or_an_older_version_left_is_replaced(tmp_path: Path) -> None:
    for name in ("000.boxes", ".head.json.123", "00000.npz", ".00001.npz.123"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "head.json").write_text('{"version": 1, "digest": "abc", "source": {}}')
    assert start(tmp_path, PROPOSALS, existing="resume or replace").missing == list(range(NUM_IMAGES))
    assert [path.name for path in tmp_path.iterdir()] == ["head.json"]


def test_a_file_in_the_place_of_a_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProposalsError, match="file: is a file, expected a folder for proposals"):
        start(tmp_path / "file", PROPOSALS)


def test_a_removed_store_leaves_no_folder(tmp_path: Path) -> None:
    store = start(tmp_path / "store")
    fill(store)
    store.remove()
    assert not list(tmp_path.iterdir())
