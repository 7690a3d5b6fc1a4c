"""Numbers for people: four digits and a prefix."""

from __future__ import annotations

PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def count(value: float) -> str:
    """1234567 -> 1,234,567"""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def percent(share: float) -> str:
    """0.1217 -> 12.2 %"""
    return f"{100 * share:.3g} %"


def scaled(value: float, unit: str = "", prefixes: tuple[str, ...] = PREFIXES) -> str:
    """1234567 -> 1.235 M"""
    steps = range(len(prefixes) - 1)
    step = next((i for i in steps if abs(value) < 999.5 * 1000**i), len(prefixes) - 1)
    number = value / 1000**step
    said = f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"
    return f"{said} {prefixes[step]}{unit}".strip()


def seconds(value: float) -> str:
    """0.001234 -> 1.234 ms"""
    return scaled(value * 1e9, "s", ("n", "µ", "m", ""))
