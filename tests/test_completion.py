"""Shell completion, in the shells themselves where they are installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import run

import mobileqat
from mobileqat.recipe import list_recipes

SHELLS = ("bash", "zsh", "fish")


def needs(shell):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"needs {shell}: apt install {shell}")


@pytest.fixture
def program(tmp_path):
    """An environment with `mobileqat` in its path, whatever is installed."""
    script = tmp_path / "bin" / "mobileqat"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom mobileqat.cli import main\nmain(prog_name='mobileqat')\n")
    script.chmod(0o755)
    path = os.pathsep.join([str(script.parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(Path(mobileqat.__file__).parents[1]), "HOME": str(tmp_path)}


def execute(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


BASH = """
eval "$(mobileqat completion bash)"
complete -p mobileqat > /dev/null
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_mobileqat_completion mobileqat 2> /dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


def in_bash(words, environment):
    return execute(["bash", "--norc", "-c", BASH, "bash", *words], environment)


def in_fish(words, environment):
    command = f'mobileqat completion fish | source; complete -C "{" ".join(words)}"'
    lines = subprocess.run(["fish", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert lines.returncode == 0, lines.stderr
    return [line.partition("\t")[0] for line in lines.stdout.splitlines()]


ASK = {"bash": in_bash, "fish": in_fish}
NAMES = [row.name for row in list_recipes()]
QUESTIONS = [
    (("mobileqat", "re"), ["recipes", "report"]),
    (("mobileqat", "train", "digits_dscnn_w"), ["digits_dscnn_w8a8"]),
    (("mobileqat", "train", "x", "--set", "quantize.cal"), ["quantize.calibration="]),
    (("mobileqat", "recipes", "sh"), ["show"]),
    (("mobileqat", "recipes", "show", "kws"), ["kws01_dscnn_w8a8"]),
    (("mobileqat", "bench", "a.tflite", "--runtime", "tflite-"), ["tflite-runtime"]),
    (("mobileqat", "evaluate", "a.tflite", "--data", "fa"), ["fashion_mnist"]),
    (("mobileqat", "completion", ""), list(SHELLS)),
]


@pytest.mark.parametrize("shell", [pytest.param(shell, marks=needs(shell)) for shell in ASK])
@pytest.mark.parametrize(("words", "expected"), QUESTIONS)
def test_completes(program, shell, words, expected):
    assert sorted(ASK[shell](words, program)) == sorted(expected)


@needs("bash")
def test_every_recipe_is_offered(program):
    assert sorted(in_bash(("mobileqat", "train", ""), program)) == sorted(NAMES)


@pytest.mark.parametrize("shell", [pytest.param(shell, marks=needs(shell)) for shell in SHELLS])
def test_the_script_is_valid(program, shell, tmp_path):
    (tmp_path / "script").write_text(run("completion", shell).output)
    execute([shell, "-n", str(tmp_path / "script")], program)


@needs("zsh")
def test_zsh_loads_it(program):
    command = 'autoload -U compinit; compinit -u; eval "$(mobileqat completion zsh)"; print $_comps[mobileqat]'
    assert execute(["zsh", "-f", "-c", command], program) == ["_mobileqat_completion"]
    answer = execute(["mobileqat"], program | {
        "_MOBILEQAT_COMPLETE": "zsh_complete", "COMP_WORDS": "mobileqat recipes sh", "COMP_CWORD": "2"
    })  # fmt: skip
    assert answer[:2] == ["plain", "show"]


def test_another_shell_is_refused():
    result = run("completion", "tcsh", code=2)
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in result.output
