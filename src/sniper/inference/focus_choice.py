"""Where fine levels of a run are searched: what `sniper focus` has chosen for its weights."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from annotated_types import Ge

from sniper.chips import LevelSpec
from sniper.config.experiment import FocusSpec, PredictSpec
from sniper.errors import RunError
from sniper.files import atomic_write, read_bytes
from sniper.runs.run import Run
from sniper.specs import Fraction, parse_json, spec_dataclass


@spec_dataclass
class FocusChoice:
    """What was chosen with the weights of one step.

    Attributes:
        step: of the weights.
        levels: hash of the levels of inference.
        focus: where levels are searched.
        num_images: number of images that it was chosen on.
        pixel_share: of the pixels of a whole search.
        time_share: of the time of a whole search.
        ap: with the focus.
        ap_whole: without.
    """

    step: Annotated[int, Ge(0)]
    levels: str
    focus: FocusSpec
    num_images: Annotated[int, Ge(1)]
    pixel_share: Fraction
    time_share: Fraction
    ap: Fraction
    ap_whole: Fraction

    def resolve(self, spec: PredictSpec, *, step: int | None) -> FocusSpec | None:
        """Return the focus if it was chosen for these weights and levels, else None."""
        return self.focus if (self.step, self.levels) == (step, hash_levels(spec.levels)) else None


def hash_levels(levels: Sequence[LevelSpec]) -> str:
    """Return a hash of the levels of inference."""
    return hashlib.sha256(json.dumps([asdict(level) for level in levels]).encode()).hexdigest()


def save_focus(run: Run, choice: FocusChoice) -> None:
    """Write what was chosen for the weights of a step, in place of what was chosen before."""
    with atomic_write(run.focus_path) as file:
        file.write(json.dumps(asdict(choice), indent=1).encode())


def load_focus(run: Run) -> FocusChoice | None:
    """Read what was chosen; None if nothing was.

    Raises:
        RunError: if the file cannot be read.
    """
    if not run.focus_path.exists():
        return None
    try:
        return parse_json(read_bytes(run.focus_path), FocusChoice)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{run.focus_path}: cannot be read ({error}); delete it to search every level as a whole"
        ) from error
