"""For the API page: our docstrings name several attributes in one line, such as `dtype, param_dtype: of ...`.

The parser of docstrings takes the second name for the type of the first. With spaces that do not break it takes them
all for one name.
"""

import re
from typing import Any

import griffe

NAMES = re.compile(r"^ +(?:\w+, )+\w+(?=: )", re.MULTILINE)


class DocstringNames(griffe.Extension):
    """Joins the names of such lines."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object of the package, before it is parsed."""
        if obj.docstring is not None:
            joined = NAMES.sub(lambda found: found[0].replace(", ", ",\N{NO-BREAK SPACE}"), obj.docstring.value)
            obj.docstring.value = joined
