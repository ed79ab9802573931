"""Numbers as people read them: counts, bytes, durations and rates, each with its unit."""

from __future__ import annotations

import math

_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def format_count(value: float) -> str:
    """Three significant digits with k, M, B (1e9), T: 8_192 -> '8.19k'."""
    for scale, suffix in _COUNTS:
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}" if value != int(value) else str(int(value))


def format_bytes(num_bytes: float) -> str:
    """Powers of 1024: 1536 -> '1.5 KiB'."""
    for scale, suffix in _BYTES:
        if abs(num_bytes) >= scale:
            return (
                f"{num_bytes / scale:.3g} {suffix}"
                if num_bytes < 1000 * scale
                else f"{num_bytes / scale:.0f} {suffix}"
            )
    return f"{num_bytes:.0f} B"


def format_duration(seconds: float) -> str:
    """'412 ms', '9.4 s', '3:07', '2:15:09', '4 d 02:15'; '?' when not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes}:{secs:02d}"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{secs:02d}"


def format_flops(flops_per_s: float) -> str:
    """FLOP/s with the SI prefix: 4.3e11 -> '430 GFLOP/s'."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flops_per_s >= scale:
            return f"{flops_per_s / scale:.3g} {prefix}FLOP/s"
    return f"{flops_per_s:.3g} FLOP/s"
