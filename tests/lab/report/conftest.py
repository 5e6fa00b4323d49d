"""Reports whose figures nobody looks at."""

import pytest

from hybridnorm_jax.lab.report import files, html_page


@pytest.fixture(scope="module")
def tables_alone():
    """Reports of one file are written without their figures, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "save_png", lambda *_: None)
        patch.setattr(html_page, "svg", lambda *_: "<svg></svg>")
        yield
