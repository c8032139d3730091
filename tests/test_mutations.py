"""Damaged files end in an error that names the file: no traceback, no hang, bounded memory."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.data.tiny import write_dataset
from tests.mutations import IMAGE_FORMATS, encode_image, mutate_bytes, mutate_json

NUM_FILES = 500
MAX_MEMORY_KB = 4_000_000


def read_all(kind: str, intact: Path, paths: Sequence[Path]) -> dict[str, str]:
    """Read files in another process; return `read` or the error for each."""
    command = [sys.executable, "-m", "tests.mutations", kind, intact, *paths]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    *lines, peak = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]} {peak} {done.stderr[-2000:]}"
    assert int(peak.removeprefix("peak ")) < MAX_MEMORY_KB
    return {name: outcome for name, _, outcome in (line.partition(" ") for line in lines)}


@pytest.mark.slow
def test_mutated_annotations_are_read_or_refused_by_name(tmp_path: Path) -> None:
    intact = write_dataset(tmp_path)
    content = json.loads(intact.read_bytes())
    paths = []
    for seed in range(NUM_FILES):
        generator = np.random.default_rng([seed, 1])
        damaged = mutate_json(content, generator)
        if seed % 3 == 0:
            damaged = mutate_bytes(damaged, generator)
        paths.append(tmp_path / f"{seed:03d}.json")
        paths[-1].write_bytes(damaged)
    outcomes = read_all("annotations", intact, paths)
    assert len(outcomes) == NUM_FILES
    refused = {name: outcome for name, outcome in outcomes.items() if outcome != "read"}
    assert refused
    assert len(refused) < NUM_FILES
    assert not [name for name, outcome in refused.items() if name not in outcome]


@pytest.mark.slow
def test_mutated_images_are_read_or_refused_by_name(tmp_path: Path) -> None:
    paths = []
    for seed in range(NUM_FILES):
        generator = np.random.default_rng([seed, 2])
        format_name = IMAGE_FORMATS[seed % len(IMAGE_FORMATS)]
        content = encode_image(format_name, generator)
        paths.append(tmp_path / f"{seed:03d}.{format_name.lower()}")
        paths[-1].write_bytes(mutate_bytes(content, generator))
    intact = tmp_path / "intact.png"
    intact.write_bytes(encode_image("PNG", np.random.default_rng(0)))
    outcomes = read_all("images", intact, paths)
    assert len(outcomes) == NUM_FILES
    refused = {name: outcome for name, outcome in outcomes.items() if outcome != "read"}
    assert refused
    assert len(refused) < NUM_FILES
    assert not [name for name, outcome in refused.items() if name not in outcome]
