"""Which way imports point, and that a light import stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mobileqat

PACKAGE = Path(mobileqat.__file__).parent
HEAVY = {"tensorflow", "keras", "tf_keras", "ai_edge_litert", "matplotlib", "sklearn"}

# What each core module may import of the package, directly or not: the arrows of the design.
MAY_IMPORT = {
    "errors": set(),
    "schemes": {"errors"},
    "numerics": {"schemes"},
    "graph": {"errors"},
    "primitives": {"graph"},
    "rules": {"primitives"},
    "lowerer": {"graph", "primitives", "rules"},
    "lower_shapes": {"graph", "lowerer"},
    "lower_products": {"graph", "lower_shapes", "lowerer"},
    "lower_operators": {"graph", "lower_products", "lower_shapes", "lowerer", "primitives", "rules"},
    "lower_layers": {"graph", "lower_operators", "lower_products", "lower_shapes", "lowerer", "primitives"},
    "lower_int16": {"graph", "lower_operators", "lower_products", "lower_shapes", "lowerer"},
    "formulas": {"graph", "primitives"},
    "lowering": {"errors", "formulas", "graph", "lower_int16", "lower_layers", "lower_operators", "lowerer", "rules"},
    "plan": {"errors", "graph", "rules", "schemes"},
    "fakequant": {"numerics", "schemes"},
    "batch_norm": set(),
    "fixed_point": set(),
    "kernels": {"fakequant", "fixed_point", "primitives"},
    "kernels16": {"fakequant", "fixed_point", "kernels"},
    "wrappers": {
        "batch_norm",
        "fakequant",
        "fixed_point",
        "kernels",
        "kernels16",
        "numerics",
        "plan",
        "rules",
        "schemes",
    },
    "quantize": {"errors", "fakequant", "graph", "lowering", "plan", "rules", "schemes", "wrappers"},
    "operands": {"errors", "flatbuffer"},  # the latter for its types alone
    "flatbuffer": {"errors", "operands"},
    "progress": set(),
    "runtime": {"errors", "flatbuffer", "numerics", "progress"},
    "metadata": {"errors", "flatbuffer"},
    "snippets": {"errors", "flatbuffer", "metadata"},
    "new": {"errors", "recipe"},
    "evaluate": {"errors"},
    "recipe": {"bench", "errors"},
    "models": {"errors", "models", "quantize"},
    "rundir": {"errors"},
}


def modules():
    """Every module of the package: dotted name below `mobileqat` -> path."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    }


def imports(path, everywhere=True):
    """Dotted names that a module imports; only at its top level unless `everywhere`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(names):
    """The parts of the package among imported names: 'mobileqat.data.npz' -> 'data'."""
    known = {name.split(".")[0] for name in modules()}
    parts = {name.split(".")[1] for name in names if name.startswith("mobileqat.")}
    return parts & known


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_arrows(name):
    assert inside(imports(modules()[name])) <= MAY_IMPORT[name]


def test_only_lowering_knows_how_layers_are_lowered():
    """What comes after sees the lowered graph and the table of rules."""
    parts = {"lowerer", "lower_int16", "lower_layers", "lower_operators", "lower_products", "lower_shapes", "formulas"}
    importers = {name for name, path in modules().items() if inside(imports(path)) & parts}
    assert importers <= {"lowering", *parts}


CORE = ["quantize", "calibrate", "convert", "parity", "distillation", "schedule", "train"]
CORE += ["layerwise", "equalize", "bias_correction", "adaround", "analyze", "search"]


@pytest.mark.parametrize("name", CORE)
def test_the_core_does_not_know_the_program(name):
    assert not inside(imports(modules()[name])) & {"pipeline", "cli", "console", "report", "bench", "rundir"}


@pytest.mark.parametrize("name", [name for name in modules() if name.split(".")[0] in ("bench", "report", "recipe")])
def test_results_and_recipes_never_import_keras(name):
    found = {imported.split(".")[0] for imported in imports(modules()[name])}
    assert not found & {"keras", "tensorflow", "tf_keras"}
    assert not inside(imports(modules()[name])) & {"quantize", "models", "train", "convert", "calibrate"}


def test_only_the_program_knows_keras_2():
    importers = {name for name, path in modules().items() if "legacy" in inside(imports(path))}
    assert {name for name in importers if not name.startswith("legacy.")} <= {"cli", "pipeline"}


def test_only_the_other_process_imports_keras_2():
    """Importing TFMOT changes TensorFlow's Keras for everyone in the process."""
    packages = {"tf_keras", "tensorflow_model_optimization"}
    importers = {n for n, path in modules().items() if {i.split(".")[0] for i in imports(path)} & packages}
    assert importers == {"legacy.training", "legacy.worker"}
    users = {name for name, path in modules().items() if imports(path) & {f"mobileqat.{name}" for name in importers}}
    assert users == {"legacy.training", "legacy.worker"}


def test_only_the_command_line_knows_the_pipeline():
    importers = {name for name, path in modules().items() if "pipeline" in inside(imports(path))}
    assert importers <= {"cli", "__main__"}


def test_only_the_program_knows_the_command_line():
    assert {name for name, path in modules().items() if "cli" in inside(imports(path))} <= {"__main__"}


def test_command_line_imports_little():
    at_top = imports(modules()["cli"], everywhere=False)
    assert inside(at_top) <= {"bench", "recipe", "pipeline", "errors", "progress", "rundir"}
    assert not {name.split(".")[0] for name in at_top} & HEAVY


def test_no_cycles():
    graph = {name: inside(imports(path, everywhere=False)) - {name} for name, path in modules().items()}
    order = []
    while graph:
        free = [name for name, needed in graph.items() if not needed & set(graph)]
        assert free, f"these import each other: {sorted(graph)}"
        order += free
        graph = {name: needed for name, needed in graph.items() if name not in free}
    assert len(order) == len(modules())


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


HEAVY_MODULES = f"import sys; print(sorted({HEAVY!r} & set(sys.modules)))"


@pytest.mark.parametrize(
    "statement",
    [
        "import mobileqat",
        "import mobileqat.cli",
        "import mobileqat.recipe",
        "import mobileqat.numerics, mobileqat.flatbuffer, mobileqat.runtime, mobileqat.evaluate",
        "from mobileqat import inspect, MobileQatError",
        "import mobileqat.models",
        "import mobileqat.legacy.worker",
    ],
)
def test_light_imports(statement):
    result = run(f"{statement}; {HEAVY_MODULES}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["train", "--help"], ["--version"]])
def test_light_commands(arguments):
    code = (
        f"from mobileqat.cli import main\ntry:\n    main({arguments!r})\n"
        f"except SystemExit as end:\n    assert not end.code\n{HEAVY_MODULES}"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_public_names():
    assert mobileqat.__all__ == sorted(mobileqat.__all__)
    assert dir(mobileqat) == mobileqat.__all__
    assert all(getattr(mobileqat, name).__name__ == name for name in mobileqat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise_model'"):
        mobileqat.quantise_model  # noqa: B018


def test_the_interface_of_the_quick_start():
    wanted = {
        "quantize_model", "quantize_annotate_layer", "quantize_annotate_model", "quantize_apply", "calibrate",
        "convert", "inspect", "verify", "strip",
    }  # fmt: skip
    assert wanted <= set(mobileqat.__all__)


def test_functions_are_not_hidden_by_modules_of_their_name():
    result = run("import mobileqat as mq, mobileqat.convert, mobileqat.calibrate; print(mq.convert, mq.calibrate)")
    assert result.stdout.count("<function") == 2, result.stderr


def test_no_helper_modules():
    assert not [name for name in modules() if "util" in name or "helper" in name]
