"""The benchmark of a focus: which blocks a search that knows the objects would show, and what that costs."""

import json
import subprocess
import sys
from pathlib import Path

from tests.data.tiny import write_dataset

ROOT = Path(__file__).parent.parent


def test_the_oracle_searches_cells_with_objects_and_a_margin(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, sides=[(2048, 1024)], boxes_per_image=1)
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0] |= {"bbox": [300, 10, 40, 20], "area": 800, "iscrowd": 0}
    path.write_text(json.dumps(content))
    levels = "[{factor: 1.0, below: 60}, {long_side: 256, at_least: 40}]"
    command = [sys.executable, ROOT / "benchmarks" / "focus.py", "oracle", path, "--levels", levels]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    (line,) = map(json.loads, done.stdout.splitlines())
    # The second cell of the first row, 256 px, with 64 px on three sides: 6 by 5 blocks of 32 by 16.
    assert line["share_of_finest"] == round(30 / 512, 3)
    assert line["times_cheaper"] == round((512 + 8) / (30 + 8), 2)
    assert line["images"] == 1
