"""Figures as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Three digits and a unit: 12.3 ms, 1.5 s, 2 min 5 s."""
    if seconds >= 120:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{1e3 * seconds:.3g} ms"
    return f"{1e6 * seconds:.3g} µs" if seconds > 0 else "0 s"


def share(part: float) -> str:
    """A percentage, finer where it is small."""
    percent = 100 * part
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.2g} %"


def amount(value: float) -> str:
    """A number without false precision."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.3g}"
