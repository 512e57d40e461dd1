"""TensorFlow Lite's `benchmark_model`: the command line that asks it, and the reading of what it prints.

The program exits with 0 after ignoring a flag, after a delegate that took nothing, and (over adb) after dying, so only
its text counts, and a number is returned if the text is complete and agrees with itself.  The memory is printed once
and has no second print; `benchmark_timings` and `benchmark_profile` say what theirs are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mobileqat.bench.benchmark_profile import parse_profile
from mobileqat.bench.benchmark_timings import NUMBER, Latency, timings
from mobileqat.bench.record import Delegate, OperatorCost, Settings
from mobileqat.errors import DeviceError


@dataclass(frozen=True)
class Parsed:
    """What one run of the program said.

    Attributes:
        init_ms: loading the file, applying delegates and allocating tensors.
        first_ms: the very first inference.
        warmup, runs: how many inferences there were.
        peak_memory_bytes: growth of the largest resident set since the program's start.
        delegation: "complete" or "partial" if a delegate says that it took operators.
        delegate: the same with its counts, None where the text has no counts.
        profile: one entry per operator that was executed, in order; costs in milliseconds.
    """

    init_ms: float
    first_ms: float
    warmup: int
    runs: int
    latency_ms: Latency
    peak_memory_bytes: int | None = None
    delegation: str | None = None
    delegate: Delegate | None = None
    profile: tuple[OperatorCost, ...] = ()
    warnings: tuple[str, ...] = ()


# --- the command line


def command(
    binary: str,
    graph: str,
    settings: Settings,
    *,
    inputs: Sequence[tuple[str, Sequence[int], str]] = (),
    output: str | None = None,
) -> list[str]:
    """The arguments of one measurement with exactly `settings.runs` timed inferences, or of one that writes outputs.

    Args:
        binary, graph: paths where the program runs.
        inputs: name, shape and file of raw values of every input, in the file's order; random values by default.
        output: file for the raw outputs, one after another; given one, there is a single inference and no warm-up,
            which would leave its traces in a model with state.

    Raises:
        DeviceError: an input's name cannot be written on this command line.
    """
    runs, warmup = (1, 0) if output else (settings.runs, settings.warmup)
    arguments: dict[str, str | int] = {
        "graph": graph,
        "num_threads": settings.threads,
        # Without the zeros both numbers are minimums; without a maximum the program stops after 150 s.
        "num_runs": runs,
        "min_secs": 0,
        "warmup_runs": warmup,
        "warmup_min_secs": 0,
        "max_secs": f"{settings.timeout_s:g}",
        **_delegate_flags(settings.delegate),
    }
    if settings.profile and not output:
        arguments["enable_op_profiling"] = "true"
    if inputs:
        arguments |= _input_flags(inputs)
    if output:
        arguments["output_filepath"] = output
    return [binary, *(f"--{name}={value}" for name, value in arguments.items())]


def _delegate_flags(delegate: str) -> dict[str, str]:
    known = {"none": {"use_xnnpack": "false"}, "xnnpack": {"use_xnnpack": "true"}, "gpu": {"use_gpu": "true"}}
    return known.get(delegate) or {"external_delegate_path": delegate}


def _input_flags(inputs: Sequence[tuple[str, Sequence[int], str]]) -> dict[str, str]:
    for name, _, path in inputs:
        if "," in name or "," in path:
            raise DeviceError(f"benchmark_model separates inputs by commas. Received: an input '{name}' from '{path}'.")
        if "\0" in name:
            raise DeviceError(f"No command line holds a zero byte. Received: an input {name!r}.")
    return {
        "input_layer": ",".join(name for name, _, _ in inputs),
        "input_layer_shape": ":".join(",".join(map(str, shape)) for _, shape, _ in inputs),
        "input_layer_value_files": ",".join(name.replace(":", r"\:") + f":{path}" for name, _, path in inputs),
    }


# --- the text


def parse(text: str, *, delegate: str | None = None) -> Parsed:
    """Reads the complete output, stdout and stderr together, or what logcat kept of it.

    Args:
        text: a last line without its end counts as cut off.
        delegate: the `Settings.delegate` that was asked for; None accepts whatever was applied.

    Raises:
        DeviceError: the program failed (the message says of what), measured something else than was asked for, or
            the text is cut off or contradicts itself.
    """
    lines = _lines(text)
    _refuse_failures(lines)
    texts = [line.text for line in lines]
    found = timings(texts)
    delegation, taken = _delegation(texts, delegate)
    profile, doubts = _profile(texts)
    reported = [line.text for line in lines if line.level and not _HARMLESS.search(line.text)]
    reported += [text for text in texts if _IGNORED.fullmatch(text)]
    return Parsed(
        **vars(found),
        peak_memory_bytes=_memory_bytes(texts),
        delegation=delegation,
        delegate=taken,
        profile=profile,
        warnings=(*reported, *doubts),
    )


def _profile(texts: Sequence[str]) -> tuple[tuple[OperatorCost, ...], list[str]]:
    """The operators, or none of them and the reason if the table is not whole: the other numbers do not need it."""
    is_elsewhere = any(re.fullmatch(r"CSV File to export profiling data to: \[.+\]", text) for text in texts)
    is_printed = any("times called" in text for text in texts)
    if not is_printed and (is_elsewhere or "Enable op profiling: [1]" not in texts):
        return (), []
    try:
        return parse_profile("".join(f"{text}\n" for text in texts)), []
    except DeviceError as error:
        return (), [f"no operator profile: {error}"]


# --- lines without what the log puts before them

_HARMLESS = re.compile(r"Duplicate flags: num_threads")
_LOGCAT = (
    re.compile(r"\d\d-\d\d \d\d:\d\d:\d\d\.\d+ +\d+ +\d+ ([VDIWEF]) ([^:]*?) *: ?(.*)"),
    re.compile(r"([VDIWEF])/([^(:]*?) *(?:\( *\d+\))?: ?(.*)"),
)
_LOGCAT_LEVELS = {"W": "WARN", "E": "ERROR", "F": "ERROR"}
_PREFIX = re.compile(r"(VERBOSE|INFO|WARN|WARNING|ERROR|FATAL): ?(?:\[[^\]]*:\d+\] ?)?")


@dataclass(frozen=True)
class _Line:
    level: str  # "WARN", "ERROR", or "" for less
    text: str  # without any prefix


def _lines(text: str) -> list[_Line]:
    """All complete lines that are the program's own."""
    *complete, _ = text.replace("\r", "").split("\n")
    return [line for line in map(_line, complete) if line is not None]


def _line(text: str) -> _Line | None:
    level = ""
    for pattern in _LOGCAT:
        match = pattern.fullmatch(text)
        if match:
            if not re.match(r"tflite|litert", match[2]):
                return None  # another program's
            level, text = _LOGCAT_LEVELS.get(match[1], ""), match[3]
    match = _PREFIX.match(text)
    if match:
        level = {"WARN": "WARN", "WARNING": "WARN", "ERROR": "ERROR", "FATAL": "ERROR"}.get(match[1], "")
        text = text[match.end() :]
    # Tables begin with a tab that belongs to them.
    return _Line(level, text.rstrip().lstrip(" "))


# --- failures, the most telling first; what a line quotes of the user's (a path, a tensor's name) is none

_DRY_RUN = "Run w/o invoking kernels: [1]"
_FAILURES: tuple[tuple[str, str], ...] = (
    (r"not executable: |Exec format error|cannot execute binary file", "is a program for another processor"),
    (r"sh: .*(?:not found|No such file or directory)", "is not there"),
    (r"Permission denied", "may not be executed or may not read a file"),
    (r"CANNOT LINK EXECUTABLE|error while loading shared libraries", "misses a library"),
    (r"Failed to parse flag", "refuses the value of a flag"),
    (r"usage: .*<flags>|^Flags:$", "only printed its help"),
    (r"Please specify the name of your TF Lite input file", "was given no file"),
    (r"Unconsumed cmdline flags: ", "was built without a flag, and ignores it"),
    (r"Could not open '", "does not find the file"),
    (r"not a valid Flatbuffer|Failed to (?:load|mmap) model", "cannot load the file"),
    (r"Regular TensorFlow ops are not supported|Select TensorFlow op|\(Flex\w+\)", "lacks TensorFlow's flex operators"),
    (r"unresolved custom op|Didn't find op for builtin opcode", "lacks an operator"),
    (r"Failed to apply \S+ delegate", "could not apply the delegate"),
    (r"Disallowed CPU fallback", "found operators that the delegate does not take"),
    (r"failed to (?:prepare|invoke)|Failed to (?:prepare|invoke|allocate tensors)", "cannot run the file"),
    (re.escape(_DRY_RUN), "made a dry run, which measures nothing"),
    (r"Segmentation fault|Aborted|^Killed|Illegal instruction|Bus error", "crashed"),
    (r"Benchmarking failed", "failed"),
)


_QUOTED = re.compile(r"\t.*|[^:]+: \[.*\]|Loaded model .*")


def _refuse_failures(lines: Sequence[_Line]) -> None:
    texts = [line.text for line in lines if not _QUOTED.fullmatch(line.text) or _DRY_RUN in line.text]
    for pattern, verdict in _FAILURES:
        found = [text for text in texts if re.search(pattern, text)]
        if found:
            errors = [line.text for line in lines if line.level == "ERROR" and "Benchmarking failed" not in line.text]
            # Errors of kernels come as a line with the condition and one with the operator.
            quoted = list(dict.fromkeys([found[0], *errors]))[:3]
            raise DeviceError(f"benchmark_model {verdict}: {' | '.join(text[:300] for text in quoted)}")


# --- memory

_MEMORY = re.compile(
    rf"Memory footprint delta from the start of the tool \(MB\): init={NUMBER} overall={NUMBER}|"
    rf"Overall footprint: +{NUMBER} MB"
)


def _memory_bytes(texts: Sequence[str]) -> int | None:
    """The program has whole KiB and prints them as MiB."""
    found = {float(match[2] or match[3]) for match in map(_MEMORY.fullmatch, texts) if match}
    return round(found.pop() * 1024) * 1024 if len(found) == 1 else None


# --- delegates

_APPLIED = re.compile(
    r"(?:Explicitly a|A)pplied (\S+) delegate, and the model graph will be (complete|partial)ly executed .*"
)
_IGNORED = re.compile(r"Though (\S+) delegate is explicitly applied, the model graph will not be executed .*")
_REPLACED = re.compile(r"Replacing (\d+)(?: out of (\d+))? node\(s\) with delegate \(([^)]+)\) node,? ?(.*)")
_CREATED = re.compile(r"Created TensorFlow Lite (?:XNNPACK delegate for CPU|delegate for (\w+))\.")


def _delegation(texts: Sequence[str], wanted: str | None) -> tuple[str | None, Delegate | None]:
    """How much of the graph a delegate took, in a word and in numbers."""
    applied = {_label(match[1]): match[2] for match in map(_APPLIED.fullmatch, texts) if match}
    replaced = [match for match in map(_REPLACED.fullmatch, texts) if match and int(match[1])]
    if wanted == "none":
        if applied or replaced or any(map(_CREATED.match, texts)):
            raise DeviceError("No delegate was asked for, and benchmark_model applied one.")
        return None, None
    labels = [*applied, *(_label(match[3]) for match in replaced)]
    label = next(iter(labels), None)
    if wanted:
        label = wanted if wanted in ("xnnpack", "gpu") else "external"
    if label is None:
        return None, None
    if label not in labels:
        reasons = [text for text in texts if _IGNORED.fullmatch(text) or "unsupported on this platform" in text]
        raise DeviceError(
            f"The delegate '{wanted}' was asked for, and benchmark_model applied it to nothing"
            f"{': ' + reasons[0] if reasons else '.'}"
        )
    return _counts(wanted or label, applied.get(label), [match for match in replaced if _label(match[3]) == label])


def _counts(name: str, delegation: str | None, replaced: Sequence[re.Match]) -> tuple[str | None, Delegate | None]:
    # A line per subgraph, repeated where the interpreter is built twice; old builds leave the second number out.
    parts = {match[4]: (int(match[1]), int(match[2] or 0)) for match in replaced}
    taken, of = sum(part[0] for part in parts.values()), sum(part[1] for part in parts.values())
    of = of or (taken if delegation == "complete" else 0)
    if not of:
        return delegation or "partial", None
    if taken > of:
        raise DeviceError(f"benchmark_model says that a delegate took {taken} of {of} operators.")
    return delegation or ("complete" if taken == of else "partial"), Delegate(name, taken, of)


def _label(name: str) -> str:
    """One word for what the program's parts call differently; every library of a vendor is "external"."""
    lowered = name.lower()
    if "xnnpack" in lowered:
        return "xnnpack"
    if "gpu" in lowered or lowered == "litert_cl":
        return "gpu"
    if "nnapi" in lowered:
        return "nnapi"
    return "external"
