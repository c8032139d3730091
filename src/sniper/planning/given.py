"""The fields of an experiment that a user has set; all others are derived from the data set."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import is_given, merge_experiment
from sniper.models.spec import DetectorSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """The fields that the user has set.

    Attributes:
        config: file of some fields; None if there is none.
        overrides: values of other fields by dotted name, as YAML.
        spec: an experiment with these values, and the defaults for all other fields.
        names: dotted names of the fields.
        model: of the detector to start from; the other fields of the section are its. None if there is none.
    """

    config: Path | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    spec: ExperimentSpec = ExperimentSpec()
    names: frozenset[str] = frozenset()
    model: DetectorSpec | None = None

    def has(self, name: str) -> bool:
        """Check whether a field, or a field within a section, was set."""
        return is_given(name, self.names)

    def over(self, derived: ExperimentSpec) -> ExperimentSpec:
        """Put the fields over a derived experiment."""
        return merge_experiment(derived, self.config, overrides=self.overrides)

    @property
    def neck(self) -> Literal["concat", "fpn"]:
        """The neck that was set, or that of the detector to start from, or else a feature pyramid.

        Other fields that were set may exclude it.
        """
        model = self.spec.model
        if (self.model or model).kind != "two_stage":
            return "fpn"
        if self.has("model.backbone.neck"):
            return model.backbone.neck
        if self.model is not None:
            return self.model.backbone.neck
        has_other_anchors = self.has("model.rpn.anchor_sizes") and len(model.rpn.anchor_sizes) != 5
        return "concat" if has_other_anchors or model.roi_head.pooling == "deformable" else "fpn"
