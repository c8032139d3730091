"""Griffe extension for the reference: read sections named `Example:`, of which Griffe knows the plural only."""

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Renames the sections before docstrings are parsed; otherwise examples would be prose."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section in the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
