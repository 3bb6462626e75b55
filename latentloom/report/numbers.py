"""Numbers as a reader wants them: four digits, thousands apart, and ticks at round values."""

import math

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 4) -> str:
    """`value` with at most `digits` significant digits: 0.0643, 26.04, 12,345, 2.1×10⁻⁵."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= exponent < 9:
        power = f"10{str(exponent).translate(SUPERSCRIPT)}"
        factor = _plain(value / 10.0**exponent, digits - 1)
        return power if factor == "1" else f"{factor}×{power}"
    return _plain(value, max(0, digits - 1 - exponent))


def _plain(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def count(value: float, unit: str) -> str:
    """`1 step`, `2 steps`: the unit is given in the singular."""
    return f"{number(value, 9)} {unit}{'' if value == 1 else 's'}"


def percent(share: float) -> str:
    return f"{number(100 * share, 2 if share < 0.995 else 3)}\N{NO-BREAK SPACE}%"


def round_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], about as many as asked for."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * m for m in (1, 2, 5) if power * m >= rough * 0.999), power * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, about: int) -> list[float]:
    """Powers of ten in [low, high]; between them 2 and 5, or round values, where there would be fewer than three."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low * 0.999 <= m * 10.0**d <= high * 1.001]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // (about + 2))]
    return [tick for tick in round_ticks(low, high, about) if tick > 0]
