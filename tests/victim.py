"""Runs a folder's `.tflite` files, each in a process of its own, and says how each ended: `python victim.py FOLDER`.

It needs one interpreter and nothing of this package.  A line per file and kind of kernels: its name, the kernels, and
"ran", "refused", or the signal that killed it; SIGALRM after ten seconds.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
from ai_edge_litert import interpreter

KERNELS = ("AUTO", "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "BUILTIN_REF")
LIMIT_S = 10
LIMIT_BYTES = 12 * 2**30


def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.tflite")):
        for kernels in KERNELS:
            print(path.name, kernels, ending(path, kernels), flush=True)


def ending(path: Path, kernels: str) -> str:
    child = os.fork()
    if not child:
        silence()
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(LIMIT_S)
        os._exit(run(path, kernels))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return {0: "ran", 1: "refused"}.get(os.WEXITSTATUS(status), f"exit {os.WEXITSTATUS(status)}")


def silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def run(path: Path, kernels: str) -> int:
    try:
        model = interpreter.Interpreter(
            model_content=path.read_bytes(),
            num_threads=1,
            experimental_op_resolver_type=interpreter.OpResolverType[kernels],
        )
        model.allocate_tensors()
        generator = np.random.default_rng(0)
        for row in model.get_input_details():
            model.set_tensor(row["index"], samples(row, generator))
        model.invoke()
        for row in model.get_output_details():
            model.get_tensor(row["index"])
    except (RuntimeError, ValueError, TypeError):
        return 1
    return 0


def samples(row: dict, generator: np.random.Generator) -> np.ndarray:
    if row["dtype"] in (np.int8, np.uint8, np.int16):
        bounds = np.iinfo(row["dtype"])
        return generator.integers(bounds.min, bounds.max, row["shape"], row["dtype"], endpoint=True)
    return np.zeros(row["shape"], row["dtype"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
