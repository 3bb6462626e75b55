"""Format numbers for people: four significant digits, thousands separators, and axis ticks at round values."""

import math

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_number(value: float, digits: int = 4) -> str:
    """Format `value` with at most `digits` significant digits: 0.0643, 26.04, 12,345, 2.1×10⁻⁵."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= exponent < 9:
        power = f"10{str(exponent).translate(SUPERSCRIPT)}"
        factor = _format_decimals(value / 10.0**exponent, digits - 1)
        return power if factor == "1" else f"{factor}×{power}"
    return _format_decimals(value, max(0, digits - 1 - exponent))


def _format_decimals(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def format_count(value: float, unit: str) -> str:
    """Format a number with its unit, `1 step` or `2 steps`; pass the unit in the singular."""
    return f"{format_number(value, 9)} {unit}{'' if value == 1 else 's'}"


def format_percent(share: float) -> str:
    """Format a share in [0, 1] as a percentage."""
    return f"{format_number(100 * share, 2 if share < 0.995 else 3)}\N{NO-BREAK SPACE}%"


def round_ticks(low: float, high: float, target_count: int) -> list[float]:
    """Return about `target_count` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    if not high > low:
        return [low]
    spacing = (high - low) / target_count
    power = 10.0 ** math.floor(math.log10(spacing))
    step = next((power * m for m in (1, 2, 5) if power * m >= spacing * 0.999), power * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, target_count: int) -> list[float]:
    """Return about `target_count` ticks for a logarithmic axis over [low, high].

    The ticks are powers of ten. If there are fewer than three, multiples of 3 are added, then multiples of 2 and 5. If there
    are still fewer than three, the ticks are those of `round_ticks`.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low * 0.999 <= m * 10.0**d <= high * 1.001]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // (target_count + 2))]
    return [tick for tick in round_ticks(low, high, target_count) if tick > 0]
