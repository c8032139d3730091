"""A setting of an experiment that was derived from the data and the machine, with the reason."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DerivedSetting:
    """One or a few fields that belong together.

    Attributes:
        name: of the setting, in words.
        value: as a table shows it.
        reason: why it has this value; for a field that the user has set, that it was given.
        option: of the command line, which sets it instead.
    """

    name: str
    value: str
    reason: str
    option: str
