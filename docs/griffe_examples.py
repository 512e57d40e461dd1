"""Lets the API reference show `Example:` sections of docstrings as code: griffe knows them as `Examples:`."""

from __future__ import annotations

import re

from griffe import Extension, Object


class Examples(Extension):
    """Renames the section before docstrings are parsed."""

    def on_object(self, *, obj: Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
