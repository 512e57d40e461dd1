"""Numbers as people read them: fixed digits, units, a sign on differences, a dash for what is missing."""

MISSING = "-"


def percent(share: float | None) -> str:
    """0.87194 -> "87.19 %"."""
    return MISSING if share is None else f"{100 * share:.2f} %"


def exact_percent(share: float | None) -> str:
    """Rounded down, so that "100 %" means all of them: 0.999999 -> "99.999 %"."""
    if share is None:
        return MISSING
    return "100 %" if share == 1 else f"{int(100_000 * share + 1e-6) / 1000:.3f} %"


def points(difference: float | None) -> str:
    """A difference in percentage points, with its sign: -0.312 -> "-0.31"; 0 has none."""
    if difference is None:
        return MISSING
    text = f"{difference:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def kilobytes(size_bytes: float | None) -> str:
    """98496 -> "98.5 kB" (1 kB is 1000 bytes)."""
    return MISSING if size_bytes is None else f"{size_bytes / 1e3:,.1f} kB"


def megabytes(size_bytes: float | None) -> str:
    return MISSING if size_bytes is None else f"{size_bytes / 1e6:,.1f} MB"


def milliseconds(latency_ms: float | None) -> str:
    """Three to four digits: 0.00611 -> "0.0061 ms", 0.2841 -> "0.284 ms", 28.41 -> "28.41 ms"."""
    if latency_ms is None:
        return MISSING
    digits = 4 if latency_ms < 0.1 else 3 if latency_ms < 10 else 2 if latency_ms < 100 else 1
    return f"{latency_ms:,.{digits}f} ms"


def millions(number: float | None) -> str:
    """9363412 -> "9.363 M"."""
    return MISSING if number is None else f"{number / 1e6:,.3f} M"


# How a cost is written in each unit of a benchmark's record.
COSTS = {"ms": milliseconds, "instructions": millions, "cycles": millions}


def seconds(duration: float | None) -> str:
    """1.24 -> "1.2 s", 812 -> "13 min 32 s"."""
    if duration is None:
        return MISSING
    if duration < 60:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def factor(value: float | None) -> str:
    """A ratio: 0.3096 -> "0.31"."""
    return MISSING if value is None else f"{value:.2f}"


def count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,}"


def significant(value: float | None) -> str:
    """Five significant digits: scales, ranges, losses."""
    return MISSING if value is None else f"{value:.5g}"


def place(target: str, runtime: str, threads: int) -> str:
    """Where a cost was measured: "litert, 2 threads" on this machine, "arm:cortex-a53, litert, 1 thread" elsewhere."""
    where = [] if target == "host" else [target]
    return ", ".join([*where, runtime, f"{threads} thread{'' if threads == 1 else 's'}"])
