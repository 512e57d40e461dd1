"""The command line: one function per subcommand, with every heavy import inside it.

Exit codes: 0 done, 1 a check failed or the run was interrupted, 2 the request cannot be carried out.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from datetime import datetime
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from mobileqat.bench.targets import USAGES
from mobileqat.errors import InspectionError, MobileQatError, ParityError
from mobileqat.progress import Advance, listening, task
from mobileqat.rundir import is_disk_full, write_whole

EXISTING = click.Path(path_type=Path)
RUNTIMES = ("litert", "litert-builtin", "litert-reference", "tflite-runtime", "tf-lite")

DATA_SOURCES = ("digits", "cifar10", "fashion_mnist", "fsdd", "kws01", "trashnet", "image_folder", "npz", "tfrecord")

debug_option = click.option("--debug", is_flag=True, help="Show tracebacks and TensorFlow's own messages.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors, and JSON if asked for.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON and nothing else.")
runtime_option = click.option("--runtime", type=click.Choice(RUNTIMES), default="litert", help="Interpreter.")
threads_option = click.option("--threads", default=1, type=click.IntRange(1, 64), help="Threads of the interpreter.")
module_option = click.option("--module", metavar="MODULE", help="Where layers of your own in MODEL are defined.")
delegate_option = click.option(
    "--delegate", default="xnnpack", metavar="NAME", help="xnnpack, gpu, none or the path of a vendor's (Android)."
)


def _complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shipped recipes by name; the shell's own completion of files where none fits."""
    from mobileqat.recipe import list_recipes

    rows = [CompletionItem(row.name, help=row.description) for row in list_recipes()]
    return [CompletionItem(incomplete, type="file"), *(row for row in rows if row.value.startswith(incomplete))]


def _complete_key(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Keys of a recipe, for --set."""
    from mobileqat.recipe import recipe_keys

    rows = [CompletionItem(f"{key}=", help=description) for key, description in recipe_keys().items()]
    return [row for row in rows if row.value.startswith(incomplete)]


def _complete_from(names: Sequence[str]) -> Callable:
    return lambda context, parameter, incomplete: [
        CompletionItem(name) for name in names if name.startswith(incomplete)
    ]


def targets_option(default: tuple[str, ...]) -> Callable:
    """--target, any number of times."""
    names = ("host", "arm:cortex-a53", "arm:cortex-a76", "android", "ssh://", "ethos-u55-128")
    complete = _complete_from(names)
    return click.option(
        "--target",
        "targets",
        multiple=True,
        default=default,
        metavar="TARGET",
        help=USAGES + ".",
        shell_complete=complete,
    )


def data_options(required: bool) -> Callable:
    """--data and --data-path: where samples come from."""
    source = click.option(
        "--data",
        "source",
        required=required,
        metavar="SOURCE",
        help=f"{', '.join(DATA_SOURCES)} or module:function.",
        shell_complete=_complete_from(DATA_SOURCES),
    )
    path = click.option(
        "--data-path", type=click.Path(), metavar="PATH", help="File or folder of image_folder, npz and tfrecord."
    )
    size = click.option("--image-size", nargs=2, type=int, metavar="H W", help="Resize images to this.")
    more = click.option(
        "--data-option", multiple=True, metavar="KEY=VALUE", help="As data.options of a recipe, e.g. channels=1."
    )
    return lambda function: source(path(size(more(function))))


def _data_options(pairs: Sequence[str]) -> dict[str, Any]:
    """--data-option as what a recipe's `data.options` would hold."""
    import yaml

    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals) or key in ("source", "path", "image_size"):
            raise click.UsageError(f"--data-option expects KEY=VALUE, such as channels=1. Received: {pair!r}")
        try:
            options[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            options[key] = text
    return options


def _know_classes(module: str | None) -> None:
    """Until the command ends, Keras files may hold layers that a module of the user defines."""
    from mobileqat import models

    click.get_current_context().with_resource(models.own_classes(module))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mobileqat")
def main() -> None:
    """From a Keras model to a verified integer .tflite file.

    \b
    Start here:
      mobileqat recipes                        what can be run
      mobileqat train digits_dscnn_w8a8        a whole run in about a minute
      mobileqat new                            a recipe for your own data and model
    """


def command(function: Callable) -> Callable:
    """A subcommand with --debug and --quiet, whose errors end in one message and the right exit code."""
    return main.command(context_settings={"show_default": True})(_guarded(function))


def _guarded(function: Callable, silences: bool = True) -> Callable:
    """`silences`: other libraries; Python writes the prompt of a question where they write their notices."""

    @debug_option
    @quiet_option
    @wraps(function)
    def run(debug: bool, quiet: bool, **arguments: Any) -> None:
        click.get_current_context().meta["quiet"] = quiet
        try:
            with warnings.catch_warnings(), _ends_like_ctrl_c():
                if silences and not debug:
                    _quiet_libraries()
                with _output(arguments.get("as_json", False), quiet), listening(None if quiet else _Progress()):
                    function(**arguments)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own business
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            _fail(error)

    return run


class _Progress:
    """Shows what takes long on stderr; what draws it is imported when there is something to draw."""

    def __init__(self) -> None:
        self._bars: Any = None

    def __call__(self, what: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        if self._bars is None:
            from mobileqat.console import stderr_bars

            self._bars = stderr_bars()
        return self._bars(what, total, unit)


def _loading() -> AbstractContextManager[Advance]:
    """For imports that take seconds."""
    return task("loading TensorFlow")


@contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM a KeyboardInterrupt, so that what was begun on a phone or a board is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _output(as_json: bool, quiet: bool) -> Iterator[None]:
    """With --quiet, drops what is printed; with --json, sends what others print, such as downloads, to stderr."""
    click.get_current_context().meta["stdout"] = sys.stdout
    with ExitStack() as stack:
        if quiet:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        elif as_json:
            stack.enter_context(redirect_stdout(sys.stderr))
        yield


def _quiet_libraries() -> None:
    """Keeps the notices of other libraries off the terminal; no environment variable reaches all native ones."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module="mobileqat")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    # A stderr that somebody has replaced (tests, notebooks) stays as it is.
    if sys.__stderr__ is not None and sys.stderr is sys.__stderr__ and sys.__stderr__.fileno() == 2:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)


def _fail(error: BaseException) -> None:
    """Prints an error on one screen and exits with its code."""
    text = str(error).strip() or "no message"
    if isinstance(error, KeyboardInterrupt):
        message, code = "Interrupted.", 1
    elif isinstance(error, MobileQatError):
        message, code = text, error.exit_code
    elif is_disk_full(error):
        message, code = f"The disk is full: {text.splitlines()[0][-300:]}", 2
    elif isinstance(error, (OSError, MemoryError)):
        message, code = f"{type(error).__name__}: {text}", 2
    else:
        shown = "\n".join(text.splitlines()[:10])[:1000]
        message, code = f"Unexpected {type(error).__name__}: {shown}\nRun it again with --debug to see where.", 2
    click.echo(click.style("Error: ", fg="red", bold=True) + message, err=True)
    for note in getattr(error, "__notes__", []):
        click.echo(note, err=True)
    sys.exit(code)


def _print_json(value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False)
    click.echo(text, file=click.get_current_context().meta["stdout"])


# ------------------------------------------------------------------ commands


@command
@click.argument("recipe", shell_complete=_complete_recipe)
@click.option("--out", type=EXISTING, help="Run directory.  [default: runs/RECIPE-TIME]")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe value, e.g. qat.epochs=2.",
    shell_complete=_complete_key,
)
@click.option("--resume", is_flag=True, help="Continue the run in --out after its last finished step.")
@json_option
def train(recipe: str, out: Path | None, overrides: tuple[str, ...], resume: bool, as_json: bool) -> None:
    """Run a RECIPE: a file, or the name of a shipped one.

    \b
    Example:
      mobileqat train digits_dscnn_w8a8 --set qat.epochs=3 --out runs/digits
    """
    from mobileqat.recipe import load_recipe

    settings = load_recipe(recipe, overrides)
    if resume and out is None:
        raise click.UsageError("--resume needs --out, the directory of the run to continue.")
    if settings.distribute == "multi_worker" and out is None:
        raise click.UsageError("distribute: multi_worker needs --out, a directory that all workers share.")
    directory = out or Path("runs") / f"{settings.name}-{datetime.now():%Y%m%d-%H%M%S}"

    with _loading():
        from mobileqat import pipeline
    from mobileqat.console import RunDisplay

    # Beside JSON, which has stdout for itself, a person at a terminal still sees how far the run is.
    display = RunDisplay(quiet=click.get_current_context().meta["quiet"] or (as_json and not sys.stderr.isatty()))
    try:
        with display.log_to(directory):
            results = pipeline.train(settings, directory, resume=resume, display=display)
    except (InspectionError, ParityError):
        _show_report(directory, as_json)
        raise
    if results:  # the chief has them
        _show_report(directory, as_json)


@command
@click.argument("run_dirs", metavar="RUN_DIR...", type=EXISTING, nargs=-1, required=True)
@click.option("-o", "--output", type=EXISTING, help="Page to write.  [default: RUN_DIR/report.html, comparison.html]")
@json_option
def report(run_dirs: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Print the report of RUN_DIR again.

    Its report.html, and what lies beside it, are written anew from report.json. Several runs are compared on a page of
    their own: those that differ in nothing but the seed are taken together, by mean and range.

    \b
    Example:
      mobileqat report runs/digits
      mobileqat report runs/* -o comparison.html
    """
    from mobileqat.report import write_html, write_report

    if len(run_dirs) > 1:
        _compare_runs(run_dirs, output or Path("comparison.html"), as_json)
        return
    results = _read_report(run_dirs[0])
    if output:
        write_html(results, output)
    else:
        write_report(results, run_dirs[0])
    _show_report(run_dirs[0], as_json, output)


def _compare_runs(run_dirs: Sequence[Path], output: Path, as_json: bool) -> None:
    from rich.console import Console

    from mobileqat.report import compare, console_comparison, write_comparison

    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise click.UsageError("The same run is given twice.")
    comparison = compare({str(path): _read_report(path) for path in run_dirs})
    write_comparison(comparison, output)
    if as_json:
        _print_json(comparison)
        return
    console = Console()
    console.print(console_comparison(comparison))
    console.print(f"Comparison: {output}", highlight=False, soft_wrap=True)


def _read_report(run_dir: Path) -> dict:
    path = run_dir / "report.json"
    if not path.is_file():
        raise MobileQatError(f"There is no '{path}'. Expected the directory of a run, as train makes it.")
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise MobileQatError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(results, dict) or results.get("schema_version") != 1:
        raise MobileQatError(f"'{path}' is not a report of this version of mobileqat (no \"schema_version\": 1).")
    return results


def _show_report(run_dir: Path, as_json: bool, page: Path | None = None) -> None:
    results = _read_report(run_dir)
    if as_json:
        _print_json(results)
        return
    from rich.console import Console

    from mobileqat.report import console_summary

    console = Console()
    console.print(console_summary(results))
    console.print(f"Report: {page or run_dir / 'report.html'}", highlight=False, soft_wrap=True)


@command
@click.argument("model", type=EXISTING)
@click.option("-o", "--output", type=EXISTING, help="File to write.  [default: MODEL with .tflite]")
@data_options(required=False)
@module_option
@click.option("--ranges", type=EXISTING, metavar="FILE", help="Activation ranges that import-keras2 wrote.")
@click.option("--samples", default=512, type=click.IntRange(1), help="Training samples for calibration.")
@click.option("--method", type=click.Choice(("minmax", "percentile", "mse")), default="minmax")
@click.option("--scheme", default="w8a8")
@click.option("--input-type", type=click.Choice(("auto", "int8", "uint8", "int16", "float32")), default="auto")
@click.option("--output-type", type=click.Choice(("auto", "int8", "uint8", "int16", "float32")), default="auto")
@click.option("--metadata/--no-metadata", default=True, help="Put the labels of --data into the file.")
@json_option
def convert(
    model,
    output,
    source,
    data_path,
    image_size,
    data_option,
    module,
    ranges,
    samples,
    method,
    scheme,
    input_type,
    output_type,
    metadata,
    as_json,
) -> None:
    """Convert MODEL to an integer .tflite file.

    A model saved after quantize_model is converted as it is; a float model is quantized first, with ranges from --data,
    from --ranges, or from the latter where it has one and the former elsewhere.

    \b
    Example:
      mobileqat convert model.keras --data npz --data-path data.npz -o model.tflite
    """
    with _loading():
        from mobileqat import models, pipeline
    from mobileqat.flatbuffer import inspect as inspect_file

    _know_classes(module)
    loaded = models.load_model(model)
    path = output or model.with_suffix(".tflite")
    _check_output(path, model)
    dataset = pipeline.load_data(source, data_path, image_size, _data_options(data_option)) if source else None
    content = pipeline.convert_model(loaded, dataset, scheme, method, samples, input_type, output_type, ranges)
    if dataset is not None and metadata:
        content = pipeline.with_metadata(content, dataset, loaded.name)
    pipeline.write_whole(path, lambda temporary: temporary.write_bytes(content))
    inspection = inspect_file(content)
    if as_json:
        _print_json({"file": str(path)} | _inspection_dict(content, inspection))
    else:
        _print_inspection(path, inspection, content)
    _exit_unless(inspection.fully_integer and not inspection.problems)


@command
@click.argument("source", type=EXISTING)
@click.argument("target", type=EXISTING)
@click.option("--ranges", type=EXISTING, metavar="FILE", help="Write the activation ranges that TFMOT trained.")
@json_option
def import_keras2(source: Path, target: Path, ranges: Path | None, as_json: bool) -> None:
    """Rebuild the Keras 2 model SOURCE in Keras 3 as TARGET.

    SOURCE is an .h5 or .keras file or a SavedModel folder with a whole model. Where tf_keras is installed, the outputs
    of both are compared on random inputs, and nothing is written if they differ. A model that TFMOT has quantized
    becomes its float model with the trained weights; its activation ranges go to --ranges, for convert --ranges.

    \b
    Example:
      mobileqat import-keras2 old.h5 new.keras
    """
    from mobileqat.legacy.keras2 import import_keras2

    for path in filter(None, (target, ranges)):
        _check_output(path, source)
    with task(f"rebuilding {source.name}"):
        imported = import_keras2(source, target)
    if ranges is not None:
        if imported.ranges is None:
            raise MobileQatError(
                f"'{source}' has no activation ranges: TFMOT has not quantized it. '{target}' is written."
            )
        imported.ranges.save(ranges)
    if as_json:
        _print_json(imported.to_dict())
        return
    click.echo(f"{target}: {imported.layers} layers, {imported.weights} weights")
    if imported.not_compared:
        click.echo(f"The outputs were not compared with those of {source}: {imported.not_compared}")
    else:
        click.echo(
            f"Largest difference of the outputs to tf_keras {imported.largest_difference:.3g}, of a largest output of "
            f"{imported.largest_output:.3g}"
        )
    if ranges is not None and imported.ranges is not None:
        click.echo(f"{ranges}: {len(imported.ranges.ranges)} activation ranges")
        for layer in imported.ranges.untrained:
            click.echo(f"  none for '{layer}': its range is still where TFMOT starts it")


def _check_output(path: Path, model: Path) -> None:
    """Says at once what would otherwise end the command after all its work."""
    if path.is_dir() or path.resolve() == model.resolve():
        raise MobileQatError(f"'{path}' is a folder, or the model itself. Expected another file to write: -o FILE.")
    _check_folder(path)


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise MobileQatError(f"There is no folder '{path.parent}' to write '{path.name}' into. Make it first.")


def _exit_unless(passed: bool) -> None:
    if not passed:
        sys.exit(1)


@command
@click.argument("file", type=EXISTING)
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Say what is inside FILE, and whether it is fully integer.

    The exit code is 1 if it is not.

    \b
    Example:
      mobileqat inspect qat.tflite --json
    """
    from mobileqat.flatbuffer import inspect as inspect_file
    from mobileqat.flatbuffer import read

    content = read(file).content
    inspection = inspect_file(file)
    if as_json:
        _print_json(_inspection_dict(content, inspection))
    else:
        _print_inspection(file, inspection, content)
    _exit_unless(inspection.fully_integer and not inspection.problems)


def _inspection_dict(content: bytes, inspection) -> dict[str, Any]:
    from mobileqat.metadata import read_metadata

    metadata = read_metadata(content)
    return inspection.to_dict() | {"metadata": None if metadata is None else vars(metadata)}


def _print_inspection(path: Path, inspection, content: bytes) -> None:
    from rich.console import Console
    from rich.table import Table

    from mobileqat.metadata import read_metadata

    console = Console(soft_wrap=True, highlight=False)
    passed = inspection.fully_integer and not inspection.problems
    verdict = "[green]fully integer[/]" if passed else "[red]not fully integer[/]"
    size, weights = inspection.size_bytes / 1000, inspection.weight_bytes / 1000
    console.print(f"{path}: {verdict}, {size:.1f} kB of which constants {weights:.1f} kB")
    for role, tensors in (("input", inspection.inputs), ("output", inspection.outputs)):
        for tensor in tensors:
            grid = "" if tensor.scale is None else f", scale {tensor.scale:.6g}, zero point {tensor.zero_point}"
            console.print(f"  {role} '{tensor.name}': {tensor.dtype} {list(tensor.shape)}{grid}", markup=False)
    if metadata := read_metadata(content):
        labels = ", ".join(metadata.labels[:4]) + (", ..." if len(metadata.labels) > 4 else "")
        kind = f"{metadata.color_space} image" if metadata.color_space else "values"
        scaling = (
            "as it is" if (metadata.mean, metadata.std) == (0, 1) else f"(x - {metadata.mean:g}) / {metadata.std:g}"
        )
        console.print(f"  metadata: input {kind}, {scaling}; {len(metadata.labels)} labels: {labels}", markup=False)
    table = Table("operator", "count", box=None, pad_edge=False)
    for name, count in sorted(inspection.operator_counts.items(), key=lambda item: -item[1]):
        table.add_row(name, str(count))
    console.print(table)
    for problem in inspection.problems:
        console.print(f"  - {problem}", markup=False)


@command
@click.argument("files", type=EXISTING, nargs=-1, required=True, metavar="[MODEL] FILE")
@data_options(required=False)
@module_option
@click.option("--samples", default=256, type=click.IntRange(1), help="Test samples; random ones without --data.")
@targets_option(())
@delegate_option
@runtime_option
@json_option
def verify(
    files, source, data_path, image_size, data_option, module, samples, targets, delegate, runtime, as_json
) -> None:
    """Compare the quantized Keras MODEL with FILE, in LSBs.

    With --target, FILE on that target is compared with FILE on this machine, and MODEL may be left out. The exit code
    is 1 if a difference is beyond its bar: between a target's CPU and this machine's, any difference.

    \b
    Example:
      mobileqat verify runs/digits/models/qat.keras runs/digits/qat.tflite --data digits
      mobileqat verify runs/digits/qat.tflite --data digits --target arm:cortex-a53 --target android
    """
    with _loading():
        from mobileqat import models, pipeline
    from mobileqat.bench import measure, show
    from mobileqat.bench.record import Settings

    _know_classes(module)
    *model, file = files
    if len(model) > 1 or not (model or targets):
        raise click.UsageError("Expected the MODEL that FILE was made from and FILE, or FILE and a --target.")
    usable = _usable_targets(targets)
    dataset = pipeline.load_data(source, data_path, image_size, _data_options(data_option)) if source else None
    result = None
    if model:
        result = pipeline.verify_model(models.load_model(model[0]), file, dataset, samples, runtime)
        if not as_json:
            _print_parity(result)
    settings = Settings(runtime=runtime, delegate=delegate)
    agreements = pipeline.verify_on_targets(file, dataset, samples, usable, settings)
    problems = list(result.problems) if result else []
    problems += measure.problems(file.name, agreements)
    if as_json:
        parity = result.to_dict() if result else {}
        _print_json(parity | {"targets": {name: vars(agreement) for name, agreement in agreements.items()}})
    else:
        if agreements:
            show.print_agreements(agreements)
        click.echo(click.style("failed", fg="red") if problems else click.style("passed", fg="green"))
        for problem in problems:
            click.echo(f"  - {problem}")
    _exit_unless(not problems)


def _print_parity(result) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table("operator", "kind", "outputs", "identical", "largest", "passed", box=None, pad_edge=False)
    for row in result.operators:
        passed = "[green]yes[/]" if row.passed else "[red]no[/]"
        table.add_row(row.operator, row.kind, str(row.outputs), f"{row.identical:.4%}", f"{row.max_lsb} LSB", passed)
    console.print(table)
    weights, whole = result.weights, result.end_to_end
    console.print(f"weights: {weights.identical} of {weights.compared} integers identical")
    console.print(
        f"end to end, {whole.samples} samples on {result.runtime}: {whole.identical:.4%} of the outputs identical, "
        f"largest difference {whole.max_lsb} LSB, top-1 agreement {whole.top1_agreement:.3%}"
    )


@command
@click.argument("model", type=EXISTING)
@data_options(required=True)
@module_option
@click.option("--limit", type=click.IntRange(1), help="Use only the first test samples.")
@runtime_option
@threads_option
@json_option
def evaluate(model, source, data_path, image_size, data_option, module, limit, runtime, threads, as_json) -> None:
    """Score MODEL on the test split of --data.

    MODEL is a .tflite, .keras or .h5 file.

    \b
    Example:
      mobileqat evaluate qat.tflite --data cifar10
    """
    with _loading():
        from mobileqat import pipeline

    dataset = pipeline.load_data(source, data_path, image_size, _data_options(data_option))
    _know_classes(module)
    result = pipeline.evaluate_file(model, dataset, limit, runtime, threads)
    if as_json:
        _print_json(result)
        return
    click.echo(f"{model}: accuracy {result['accuracy']:.2%} on {result['samples']} test samples ({result['runtime']})")
    for row in result["per_class"]:
        click.echo(f"  {row['class']:<20} {row['accuracy']:7.2%}  {row['samples']:>6} samples")


@command
@click.argument("model", type=EXISTING)
@data_options(required=True)
@module_option
@click.option("--scheme", default="w8a8", help="For a float MODEL.")
@click.option("--method", type=click.Choice(("minmax", "percentile", "mse")), default="minmax", help="Likewise.")
@click.option("--samples", default=512, type=click.IntRange(1), help="Training samples for calibration, likewise.")
@click.option("--limit", default=512, type=click.IntRange(1), help="Validation samples to run on.")
@click.option("--out", type=EXISTING, help="Folder for analysis.json and charts.")
@json_option
def analyze(
    model, source, data_path, image_size, data_option, module, scheme, method, samples, limit, out, as_json
) -> None:
    """Say what quantization costs in MODEL, layer by layer.

    SQNR is the power of a layer's float outputs over that of the error that rounding makes, with float values as its
    inputs, of all channels or of the median one; "alone" is the change of accuracy with only this layer in integers,
    "all but it" with only this one in float. The layers that cost most come first. Float is what the model was
    quantized from: for a run's ptq.keras the calibrated.keras beside it, if its rounding was learned.

    \b
    Example:
      mobileqat analyze runs/digits/models/ptq.keras --data digits --out analysis
    """
    with _loading():
        from mobileqat import pipeline
    from mobileqat.report.layers import print_analysis, write_analysis

    if out is not None and out.exists() and not out.is_dir():
        raise MobileQatError(f"'{out}' is a file. Expected a folder to write charts into: --out FOLDER.")
    dataset = pipeline.load_data(source, data_path, image_size, _data_options(data_option))
    _know_classes(module)
    result = pipeline.analyze_model(model, dataset, scheme, method, samples, limit).to_dict()
    if out is not None:
        write_analysis(result, out)
    if as_json:
        _print_json(result)
        return
    print_analysis(result)
    if out is not None:
        click.echo(f"Charts: {out}")


@command
@click.argument("model", type=EXISTING)
@data_options(required=True)
@module_option
@click.option("--budget", required=True, metavar="LIMIT", help="size=60kB, size=60%, cost=0.5ms or cost=80%.")
@click.option("--scheme", "schemes", multiple=True, default=("w8a8", "w4a8"), help="To choose from; the first counts.")
@click.option("--with-float", is_flag=True, help="Let layers stay in float.")
@click.option("--samples", default=512, type=click.IntRange(1), help="Training samples for calibration.")
@click.option("--limit", default=512, type=click.IntRange(1), help="Validation samples for the search.")
@click.option("-o", "--output", type=EXISTING, help="Recipe to write.  [default: MODEL-mixed.yaml]")
@json_option
def search(
    model,
    source,
    data_path,
    image_size,
    data_option,
    module,
    budget,
    schemes,
    with_float,
    samples,
    limit,
    output,
    as_json,
) -> None:
    """Find the bits of each layer's weights under a budget.

    MODEL is a float model. The result is a recipe for train. A share of a budget counts from the first scheme in all
    layers; cost is measured on this machine, operator by operator.

    \b
    Example:
      mobileqat search model.keras --data cifar10 --budget size=70% -o mixed.yaml
    """
    with _loading():
        from mobileqat import pipeline
    from mobileqat.recipe import dump_recipe
    from mobileqat.report.layers import print_search
    from mobileqat.search import parse_budget

    path = output or model.with_name(f"{model.stem}-mixed.yaml")
    _check_output(path, model)
    data = {
        "source": source,
        "path": data_path,
        "image_size": list(image_size) if image_size else None,
        "options": _data_options(data_option),
    }
    _know_classes(module)
    recipe, found = pipeline.search_model(model, data, schemes, parse_budget(budget), samples, limit, with_float)
    pipeline.write_whole(path, lambda temporary: temporary.write_text(dump_recipe(recipe)))
    if as_json:
        _print_json(found | {"recipe": str(path)})
        return
    print_search(found)
    click.echo(f"Recipe: {path}, to run with: mobileqat train {path}")


@command
@click.argument("files", type=EXISTING, nargs=-1, required=True)
@targets_option(("host",))
@click.option("--runs", default=200, type=click.IntRange(1), help="Timed inferences.")
@click.option("--warmup", default=20, type=click.IntRange(0), help="Inferences before them.")
@click.option("--cpus", metavar="LIST", help="Cores to run on, such as 0 or 4-7; on a phone also big or little.")
@delegate_option
@click.option("--min-delegated", type=click.FloatRange(0, 1), help="Fail if a delegate takes a smaller share.")
@click.option("--profile", is_flag=True, help="Measure every operator too.")
@click.option("--compare", is_flag=True, help="Show the differences operator by operator.")
@runtime_option
@threads_option
@json_option
def bench(
    files, targets, runs, warmup, cpus, delegate, min_delegated, profile, compare, runtime, threads, as_json
) -> None:
    """Measure what one inference of FILES costs.

    Several files are run in turns and compared with the first. On other targets the outputs on fixed vectors are
    compared with this machine's; the exit code is 1 if they differ.

    \b
    Example:
      mobileqat bench float.tflite qat.tflite --threads 2
      mobileqat bench qat.tflite --target host --target arm:cortex-a53
      mobileqat bench --compare a.tflite b.tflite
    """
    from mobileqat.bench import measure, show
    from mobileqat.bench.record import Settings

    if len(set(files)) < len(files):
        raise click.UsageError("The same file is given twice.")
    if compare and len(files) < 2:
        raise click.UsageError("--compare needs at least two files.")
    settings = Settings(runtime, threads, warmup, runs, cpus, delegate, profile or compare)
    named = {str(file): file for file in files}
    results, problems = {}, []
    for target in _usable_targets(targets):
        comparison = results[target.name] = measure.measure(named, target, settings)
        problems += measure.disagreements(comparison.records)
        if not as_json:
            show.print_comparison(comparison, compare)
        if min_delegated is not None:
            measure.require_delegated(comparison.records, min_delegated)
    if as_json:
        _print_json({name: comparison.to_dict() for name, comparison in results.items()})
    for problem in problems:
        click.echo(problem, err=True)
    _exit_unless(not problems)


def _usable_targets(names: Sequence[str]) -> list:
    """Targets by name; what one of them lacks is said before any is used."""
    from mobileqat.bench.targets import parse_target, require_target

    targets = [parse_target(name) for name in dict.fromkeys(names)]
    for target in targets:
        require_target(target)
    return targets


@command
@targets_option(("host", "arm:cortex-a53", "android", "ethos-u55-128"))
@json_option
def doctor(targets: tuple[str, ...], as_json: bool) -> None:
    """Say what is there, what is missing, and how to get it.

    The exit code is 1 if something is missing that mobileqat, this machine or a --target that you name needs.

    \b
    Example:
      mobileqat doctor --target arm:cortex-a76
    """
    from mobileqat.bench import show
    from mobileqat.bench.targets import parse_target
    from mobileqat.doctor import check_installation

    is_named = click.get_current_context().get_parameter_source("targets") is not ParameterSource.DEFAULT
    checks = {} if is_named else {"mobileqat": check_installation()}
    with task("looking at targets", len(targets), "targets") as advance:
        for name in dict.fromkeys(targets):
            checks[name] = parse_target(name).check()
            advance(1)
    if as_json:
        _print_json({name: [vars(check) for check in rows] for name, rows in checks.items()})
    else:
        show.print_checks(checks)
    required = [rows for name, rows in checks.items() if is_named or name in ("mobileqat", "host")]
    _exit_unless(all(check.found is not None or not check.is_needed for rows in required for check in rows))


@main.group(invoke_without_command=True, context_settings={"show_default": True})
@json_option
@_guarded
def recipes(as_json: bool) -> None:
    """List the shipped recipes, or show one.

    \b
    Example:
      mobileqat recipes
      mobileqat recipes show digits_dscnn_w8a8
    """
    if click.get_current_context().invoked_subcommand:
        return
    from mobileqat.recipe import list_recipes

    rows = list_recipes()
    if as_json:
        _print_json([{"name": row.name, "path": str(row.path), "description": row.description} for row in rows])
        return
    width = max(len(row.name) for row in rows)
    for row in rows:
        click.echo(f"{row.name:<{width}}  {row.description}")
    click.echo("\nSee one with: mobileqat recipes show NAME\nRun one with: mobileqat train NAME")


@recipes.command(context_settings={"show_default": True})
@click.argument("recipe", shell_complete=_complete_recipe)
@click.option("--full", is_flag=True, help="With every default written out; the recipe is checked.")
@json_option
@_guarded
def show(recipe: str, full: bool, as_json: bool) -> None:
    """Print a RECIPE: a file, or the name of a shipped one.

    \b
    Example:
      mobileqat recipes show digits_dscnn_w8a8 --full
    """
    from mobileqat.recipe import dump_recipe, load_recipe, read_recipe

    path, text = read_recipe(recipe)
    if full or as_json:
        settings = load_recipe(recipe)
        if as_json:
            _print_json({"path": str(path), "recipe": settings.model_dump(mode="json")})
            return
        text = dump_recipe(settings)
    click.echo(text, nl=False)


@main.command(context_settings={"show_default": True})
@partial(_guarded, silences=False)
@click.argument("file", type=EXISTING, required=False)
@click.option("--data", metavar="DATA", help="A folder of images, an .npz file, or a source's name.")
@click.option("--data-path", metavar="PATH", help="What the source reads, if --data is image_folder or npz.")
@click.option("--image-size", nargs=2, type=click.IntRange(1), metavar="H W", help="Resize images to it.")
@click.option("--model", metavar="MODEL", help="A reference model, module:function, or a Keras file.")
@click.option("--scheme", help="Bits of weights and activations.  [default: w8a8]")
@click.option("--float-epochs", metavar="N", help="Before quantization; 0 for a trained model.")
@click.option("--qat-epochs", metavar="N", help="Of fine-tuning; 0 stops at PTQ.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@json_option
def new(file, data, data_path, image_size, model, scheme, float_epochs, qat_epochs, force, as_json) -> None:
    """Write a recipe for your own data and model to FILE.

    What the options leave open is asked for on a terminal, and takes its default elsewhere.

    \b
    Example:
      mobileqat new flowers.yaml --data photos --image-size 96 96 --model mobilenet_v2 --float-epochs 20
    """
    from mobileqat.errors import RecipeError
    from mobileqat.new import collect, write_recipe

    given = {
        "--data": data,
        "--image-size": " ".join(map(str, image_size)) if image_size else None,
        "--model": model,
        "--scheme": scheme,
        "--float-epochs": float_epochs,
        "--qat-epochs": qat_epochs,
    }
    asks = sys.stdin.isatty() and not as_json and not click.get_current_context().meta["quiet"]

    def ask(option: str, question: str, read: Callable, default: str | None) -> Any:
        def answered(text: str) -> Any:
            try:
                return read(text)
            except RecipeError as error:
                raise click.UsageError(str(error)) from None  # which asks again

        if given[option] is None and asks:
            return click.prompt(question, default=default, value_proc=answered)
        if given[option] is None and default is None:
            raise click.UsageError(f"Missing option '{option}'. {question}.")
        return read(given[option] or default)

    answers = collect(ask, data_path)
    path = file or Path(f"{answers.name}.yaml")
    if path.exists() and not force:
        raise MobileQatError(f"'{path}' is there already. Choose another FILE, or replace it with --force.")
    _check_folder(path)
    text = write_recipe(answers, str(path))
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if as_json:
        _print_json({"recipe": str(path)})
        return
    click.echo(f"{path} is written. Run it with: mobileqat train {path}")


@command
@click.argument("file", type=EXISTING)
@click.option("--language", type=click.Choice(("python", "kotlin")), default="python")
@click.option("-o", "--output", type=EXISTING, help="File to write; stdout without it.")
@json_option
def snippet(file: Path, language: str, output: Path | None, as_json: bool) -> None:
    """Print a program that runs FILE, in Python or Kotlin.

    \b
    Example:
      mobileqat snippet qat.tflite --language kotlin
    """
    from mobileqat.snippets import write_snippet

    text = write_snippet(file, language)
    if output is not None:
        _check_output(output, file)
        write_whole(output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if as_json:
        _print_json({"language": language, "output": None if output is None else str(output), "text": text})
    elif output is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"{output} runs {file}, which it expects in its own folder.")


@command
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print a script for completion in SHELL.

    \b
    To have it in every new shell:
      bash  echo 'eval "$(mobileqat completion bash)"' >> ~/.bashrc
      zsh   echo 'eval "$(mobileqat completion zsh)"' >> ~/.zshrc        (after compinit)
      fish  mobileqat completion fish > ~/.config/fish/completions/mobileqat.fish

    \b
    Example:
      mobileqat completion bash
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "mobileqat", "_MOBILEQAT_COMPLETE").source())
