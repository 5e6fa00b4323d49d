"""Lines of the lab's figures can be told apart."""

from hybridnorm_jax.lab import figure_styles


def test_styles_are_fixed_distinct_and_told_apart_without_color():
    fixed = [(str(style.linestyle), style.marker) for style in figure_styles.FIXED.values()]
    assert len({marker for _, marker in fixed}) == len(fixed)
    unknown = [f"scheme {number}" for number in range(30)]
    assert [figure_styles.style_of(label) for label in unknown] == [figure_styles.style_of(label) for label in unknown]
    chosen = figure_styles.styles_of([*figure_styles.FIXED, *unknown])
    assert len({(str(style.linestyle), style.marker) for style in chosen.values()}) == len(chosen)
    assert chosen["hybrid"] == figure_styles.style_of("hybrid") == figure_styles.FIXED["hybrid"]
