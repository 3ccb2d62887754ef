"""Units: format and parse bytes, FLOPs, counts and seconds."""

import re

from moesaic.core.errors import ConfigError

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


def show_bytes(count: float) -> str:
    """``3221225472 -> '3.00 GiB'``."""
    return _scaled(count, 1024, _BINARY)


def show_count(count: float) -> str:
    """``1_230_000 -> '1.23M'``; a billion is ``G`` in FLOPs but ``B`` in parameters and tokens."""
    return _scaled(count, 1000, ("", "k", "M", "B", "T", "Q")).replace(" ", "")


def counted(count: int, name: str) -> str:
    """``counted(1200, "row") -> '1,200 rows'``."""
    ending = "" if count == 1 else "es" if name.endswith("ch") else "s"
    return f"{count:,} {name}{ending}"


def show_flops(count: float) -> str:
    """``2.5e13 -> '25.0 TFLOP'``."""
    return _scaled(count, 1000, _DECIMAL) + "FLOP"


def show_seconds(seconds: float) -> str:
    """``75 -> '1m15s'``, ``0.0042 -> '4.20ms'``."""
    if 0 < seconds < 0.9995:
        size, unit = (seconds * 1e3, "ms") if seconds >= 0.9995e-3 else (seconds * 1e6, "us")
        return f"{size:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}{unit}"
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def parse_bytes(text: str | int) -> int:
    """``'6GiB' -> 6442450944``. Raises ConfigError naming the units that are known."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGTP]i?B|B|)\s*", str(text))
    if not match:
        raise ConfigError([f'"{text}" is not a size: expected e.g. "6GiB", "500MB" or bytes'])
    number, unit = float(match[1]), match[2]
    base = 1024 if "i" in unit else 1000
    power = "BKMGTP".index(unit[0]) if unit else 0
    return round(number * base**power)


def _scaled(count: float, base: int, names: tuple[str, ...]) -> str:
    size, level = float(count), 0
    while round(abs(size)) >= base and level < len(names) - 1:
        size, level = size / base, level + 1
    digits = 0 if level == 0 else 2 if abs(size) < 10 else 1 if abs(size) < 100 else 0
    return f"{size:.{digits}f} {names[level]}"
