"""Results as Markdown: one table per task, means over seeds with their spread, ours against the best of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from tasks import SCHEMES, TASKS, TFMOT_STEPS, Cell, fingerprint

# Whose rows stand beside ours, by scheme; where nobody else can do a scheme there is nothing to compare.
THEIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "w8a8": (("converter", "ptq"), ("tfmot", "qat"), ("mlperf", "ptq")),
    "w8a16": (("converter-w8a16", "ptq"),),
}
NAMES = {
    "converter": "TFLiteConverter PTQ w8a8",
    "converter-w8a16": "TFLiteConverter PTQ w8a16",
    "tfmot": "TFMOT QAT w8a8",
    "mlperf": "MLPerf's int8 file",
}
HEADER = (
    "| | accuracy, % | seeds | size, B | fully integer | simulation = interpreter | ours >= theirs |\n"
    "|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Row:
    """All seeds of one cell and variant."""

    label: str
    accuracies: tuple[float, ...]
    rows: tuple[dict, ...]
    reason: str = ""

    @property
    def accuracy(self) -> float | None:
        return mean(self.accuracies) if self.accuracies else None


def accuracy_table(tasks: dict[str, dict]) -> str:
    """The document: `tasks` holds each task's cells as `run.Results` keeps them."""
    lines = ["# Accuracy in the interpreter, on whole test sets", "", *provenance(tasks, "run.py"), "", *NOTES]
    for name, found in tasks.items():
        lines += ["", f"## {TASKS[name].title}", "", HEADER, *rows_of(name, found)]
    if any(OLD in line for line in lines):
        lines += ["", f"{OLD}: measured with other settings than those of now; `run.py` measures it anew."]
    return "\n".join(lines) + "\n"


OLD = "(old)"
NOTES = (
    "All rows of a task start from the same float weights. Mean over seeds, in brackets lowest to highest. Ours and "
    "the converter calibrate on the same training samples. TFMOT trains with our epochs, learning rate and "
    f"augmentation, on inputs scaled to its initial range, for {TFMOT_STEPS} steps at least. `simulation = "
    "interpreter`: share of output values that are identical, end to end, in the worst seed. `ours >= theirs`: the "
    "mean of our PTQ against the best of their PTQ, of our QAT against the best of all theirs; in brackets the "
    "difference in points.",
    "",
    "Neither TFMOT nor TFLiteConverter makes 4-bit weights, and TFMOT no 16-bit activations.",
)


def provenance(tasks: dict[str, dict], script: str) -> list[str]:
    cells = [cell for found in tasks.values() for cell in found.values() if cell.get("date")]
    if not cells:
        return []
    dates = sorted(cell["date"][:10] for cell in cells)
    machines = sorted({f"{c['machine']['cpu']}, {c['machine']['cores']} cores" for c in cells})
    versions = max(cells, key=lambda cell: cell["date"])["packages"]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [f"{days}, {'; '.join(machines)}, {shown}. Made by `benchmarks/accuracy/{script}`."]


def rows_of(name: str, found: dict) -> Iterator[str]:
    yield line(collect(found, "float", "float", "float"), "")
    for what, variant in (pair for pairs in THEIRS.values() for pair in pairs):
        if any(key.startswith(f"{what}/") for key in found):
            yield line(collect(found, what, variant, NAMES[what]), "")
    for scheme in SCHEMES:
        mark = f" {OLD}" if is_old(name, scheme, found) else ""
        for variant in ("ptq", "qat"):
            ours = collect(found, scheme, variant, f"**ours {variant.upper()} {scheme}**{mark}")
            if ours.accuracies or (ours.reason and variant == "ptq"):
                yield line(ours, compare(found, scheme, variant, ours))


def is_old(name: str, scheme: str, found: dict) -> bool:
    """Whether cells of a scheme were measured with another recipe than the present one, or from another float model."""
    start = found.get("float/0", {}).get("weights")
    for key, record in found.items():
        what, _, seed = key.rpartition("/")
        if what == scheme and "rows" in record:
            marks = {fingerprint(Cell(name, scheme, int(seed)), quick, start) for quick in (False, True)}
            if record["fingerprint"] not in marks:
                return True
    return False


def collect(found: dict, what: str, variant: str, label: str) -> Row:
    """The seeds of one row, and why it has none."""
    cells = [cell for key, cell in sorted(found.items()) if key.rpartition("/")[0] == what]
    rows = tuple(cell["rows"][variant] for cell in cells if variant in cell.get("rows", {}))
    reasons = [cell["reason"] for cell in cells if cell.get("reason") and "rows" not in cell]
    return Row(label, tuple(row["accuracy"] for row in rows), rows, "; ".join(dict.fromkeys(reasons)))


def compare(found: dict, scheme: str, variant: str, ours: Row) -> str:
    """PTQ against PTQ; QAT against whatever of theirs is best."""
    theirs = [collect(found, *pair, "") for pair in THEIRS.get(scheme, ()) if variant == "qat" or pair[1] == "ptq"]
    best = max((row.accuracy for row in theirs if row.accuracy is not None), default=None)
    if best is None or ours.accuracy is None:
        return "theirs: none"
    return f"{'yes' if ours.accuracy >= best else 'no'} ({100 * (ours.accuracy - best):+.2f})"


def line(row: Row, comparison: str) -> str:
    if not row.accuracies:
        return f"| {row.label} | {cell_text(row.reason) or 'not measured'} | | | | | {comparison} |"
    integer = {bool(each["fully_integer"]) for each in row.rows}
    cells = (
        row.label,
        percent(row.accuracies),
        str(len(row.rows)),
        " / ".join(str(size) for size in sorted({each["size_bytes"] for each in row.rows})),
        "" if row.label == "float" else "yes" if integer == {True} else "no",
        shared([each for each in row.rows if each.get("identical") is not None]),
        comparison,
    )
    return f"| {' | '.join(cells)} |"


def percent(accuracies: tuple[float, ...]) -> str:
    text = f"{100 * mean(accuracies):.2f}"
    return text if len(accuracies) == 1 else f"{text} ({100 * min(accuracies):.2f} to {100 * max(accuracies):.2f})"


def shared(rows: list[dict]) -> str:
    """The lowest of the seeds, and whether our bars for single operators and end to end are missed."""
    if not rows:
        return ""
    misses = ", misses its bars" if any(row.get("parity_problems") for row in rows) else ""
    return f"{min(row['identical'] for row in rows):.3%}{misses}"


def cell_text(reason: str) -> str:
    return reason.replace("|", "/").replace("\n", " ")


def ablation_table(tasks: dict[str, dict]) -> str:
    """One line per variant: accuracy of PTQ and QAT, and QAT's difference to the baseline's mean."""
    lines = [
        "# What each technique adds: QAT to 4-bit weights",
        "",
        *provenance(tasks, "ablation.py"),
        "",
        ABLATION_NOTE.format(100 * largest_spread(tasks)),
    ]
    for name, found in tasks.items():
        variants = dict.fromkeys(key.rpartition("/")[0] for key in found)
        baseline = collect(found, "w4a8+baseline", "qat", "").accuracy
        lines += ["", f"## {TASKS[name].title}", "", ABLATION_HEADER]
        for what in variants:
            label = what.partition("+")[2] or what
            if what == "float":
                lines.append(f"| float | {percent(collect(found, 'float', 'float', '').accuracies)} | | |")
                continue
            ptq, qat = (collect(found, what, variant, label) for variant in ("ptq", "qat"))
            if qat.accuracy is None:
                lines.append(f"| {label} | {cell_text(qat.reason)} | | |")
                continue
            change = f"{round(100 * (qat.accuracy - baseline), 2) + 0.0:+.2f}" if baseline is not None else ""
            lines.append(f"| {label} | {percent(ptq.accuracies)} | {percent(qat.accuracies)} | {change} |")
    return "\n".join(lines) + "\n"


def largest_spread(tasks: dict[str, dict]) -> float:
    """Of QAT, between the seeds of one row."""
    rows = [
        collect(found, what, "qat", "").accuracies
        for found in tasks.values()
        for what in {key.rpartition("/")[0] for key in found}
    ]
    return max((max(row) - min(row) for row in rows if row), default=0.0)


ABLATION_NOTE = (
    "Two epochs each; one seed, or the mean of several where brackets show the lowest and the highest. Seeds of one "
    "row differ by up to {:.1f} points of QAT: smaller differences are none. Baseline: scales by the largest weight, "
    "observed ranges, straight-through rounding, labels, weights rounded to nearest. The small integers are stored as "
    "int8: convolutions with int4 take several times as long in the interpreter, and round twice, which moves PTQ by "
    "up to a point."
)
ABLATION_HEADER = "| | PTQ, % | QAT, % | to the baseline |\n|---|---|---|---|"
