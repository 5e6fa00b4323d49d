"""Numbers as the tables, figures and sentences of a report show them."""

from collections.abc import Sequence

# A cell without a number.
NONE = "\N{EM DASH}"


def rate_text(rate: float | None) -> str:
    """A learning rate as it was written: 0.0003, not 3e-04; 3e-05 below 0.0001."""
    if rate is None:
        return NONE
    short = f"{rate:g}"
    return short if float(short) == rate else repr(rate)


def loss_text(loss: float | None) -> str:
    """A loss, or the deviation of losses, in nats per token."""
    return NONE if loss is None else f"{loss:.4f}"


def signed_text(difference: float | None) -> str:
    """A difference of losses, always with its sign."""
    if difference is None:
        return NONE
    # A true minus sign is as wide as a plus, so that columns align.
    return f"{difference:+.4f}".replace("-", "\N{MINUS SIGN}")


def interval_text(interval: Sequence[float]) -> str:
    """The two ends of an interval of differences."""
    low, high = interval
    return f"{signed_text(low)} to {signed_text(high)}"


def range_text(interval: Sequence[float]) -> str:
    """The two ends of an interval of losses."""
    low, high = interval
    return f"{loss_text(low)} to {loss_text(high)}"


def p_text(p: float | None) -> str:
    """A p-value."""
    if p is None:
        return NONE
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def count_or_more_text(count: int | None, most: int) -> str:
    """A number of seeds, or that there are more of them than were looked for."""
    return f"more than {most:,}" if count is None else f"{count:,}"


def percent_text(percent: float | None) -> str:
    """A percentage."""
    return NONE if percent is None else f"{percent:.2f} %"


def ratio_text(ratio: float | None) -> str:
    """A ratio to the baseline."""
    return NONE if ratio is None else f"{ratio:.3f}"


def digits_text(value: float | None) -> str:
    """Three digits, or all of those before the decimal point."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def operations_text(operations: float | None) -> str:
    """A number of arithmetic operations, with three digits: 1.23e+12."""
    return NONE if operations is None else f"{operations:.3g}"


def share_text(share: float | None) -> str:
    """A share of a whole, in percent."""
    return NONE if share is None else f"{100 * share:.1f} %"


def duration_text(seconds: float | None) -> str:
    """A time in seconds, minutes or hours."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
