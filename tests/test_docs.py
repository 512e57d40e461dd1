"""What the documentation says is true: links lead somewhere, code runs, commands parse, YAML is valid, the site builds.

Pages are parsed as Markdown, not searched as text.  Python blocks of a page run in order in one namespace and folder;
comments prepare what a reader has already:

    <!-- test: setup        -->  the comment's further lines are Python that runs first
    <!-- test: file NAME    -->  the fence that follows is also written to NAME

`test_wrong_pages_are_found` shows that each check finds a page that is wrong.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml
from markdown_it import MarkdownIt

import mobileqat
from mobileqat import cli
from mobileqat.bench.targets import find_row
from mobileqat.errors import MobileQatError, RecipeError
from mobileqat.recipe import PathlessSource, PathSource, Recipe, list_recipes, load_recipe, parse_recipe
from mobileqat.schemes import get_scheme

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")]
PAGES += [ROOT / "android_bench/README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
SOURCES = {*get_args(PathlessSource), *get_args(PathSource)}
RECIPES = {row.name for row in list_recipes()}
RECIPE_NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)+_w\d+a\d+")
SECTIONS = [name for name, field in Recipe.model_fields.items() if hasattr(field.annotation, "model_fields")]
RECIPE_KEY = re.compile(rf"({'|'.join(SECTIONS)})\.([a-z_]+(?:\.[a-z_]+)*)(?::.*)?")
FILE_SUFFIXES = {"json", "html", "keras", "npz", "tflite", "yaml", "h5", "py"}
COMMENT = re.compile(r"<!--\s*test:\s*(\w+)[ \t]*([^\n]*?)\s*(?:\n(.*?))?-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A piece of code of a page; `file` is what a comment before it calls it."""

    language: str
    text: str
    line: int
    file: str | None = None


@dataclass(frozen=True)
class Page:
    text: str
    folder: Path

    @property
    def tokens(self):
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    def inline(self):
        """What stands inside paragraphs, headings and cells."""
        return [child for token in self.tokens if token.type == "inline" for child in token.children]

    def links(self) -> list[str]:
        """Targets of links and pictures that are not on the web."""
        targets = [child.attrGet("href") or child.attrGet("src") or "" for child in self.inline()]
        return [target for target in targets if target and not re.match(r"\w+:", target)]

    def anchors(self) -> set[str]:
        """Of the headings, as GitHub and the site make them: in what is used here the two agree."""
        tokens = self.tokens
        headings = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
        return {slug("".join(child.content for child in heading.children)) for heading in headings}

    def code(self) -> list[str]:
        return [child.content for child in self.inline() if child.type == "code_inline"]

    def blocks(self) -> list[Block]:
        """Fences and indented code in order; setup comments count as Python."""
        found, file = [], None
        for token in self.tokens:
            comment = COMMENT.search(token.content) if token.type == "html_block" else None
            if comment and comment[1] == "setup":
                found.append(Block("python", comment[3], token.map[0]))
            elif comment:
                file = comment[2]
            elif token.type in ("fence", "code_block"):
                language = token.info.split()[0] if token.info else ""
                found.append(Block(language, token.content, token.map[0], file))
                file = None
        return found


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"), path.parent)


# ------------------------------------------------------------------ links and names


def broken_links(page: Page) -> list[str]:
    return [target for target in page.links() if not leads_somewhere(page, *target.partition("#")[::2])]


def leads_somewhere(page: Page, path: str, anchor: str) -> bool:
    file = page.folder / path
    if path and not file.exists():
        return False
    return not anchor or anchor in (read(file) if path else page).anchors()


def unknown_names(page: Page) -> list[str]:
    """Recipes and recipe keys that the text mentions and that do not exist."""
    unknown = []
    for code in page.code():
        if RECIPE_NAME.fullmatch(code) and code not in RECIPES:
            unknown.append(code)
        key = RECIPE_KEY.fullmatch(code)
        if key and key[2] not in FILE_SUFFIXES and not is_recipe_key(key[1], *key[2].split(".")):
            unknown.append(code)
    return unknown


def is_recipe_key(*path: str) -> bool:
    section = Recipe
    for name in path:
        if section is dict:
            return True  # keyword arguments of the user's own
        if name not in getattr(section, "model_fields", {}):
            return False
        annotation = section.model_fields[name].annotation
        section = dict if getattr(annotation, "__origin__", None) is dict else annotation
    return True


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    assert broken_links(read(ROOT / name)) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_recipes_and_their_keys_exist(name):
    assert unknown_names(read(ROOT / name)) == []


def test_every_recipe_is_described():
    described = set(read(ROOT / "recipes/README.md").code())
    assert RECIPES - described == set()


def test_every_public_name_is_in_the_reference():
    described = {line.rpartition(".")[2] for line in read(ROOT / "docs/api.md").text.split() if "mobileqat." in line}
    assert set(mobileqat.__all__) - described == set()


def test_pages_are_in_the_navigation():
    def files(entry):
        values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else [entry]
        return [entry] if isinstance(entry, str) else [file for value in values for file in files(value)]

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(listed)


# ------------------------------------------------------------------ commands


def commands(page: Page) -> list[list[str]]:
    """The words after `mobileqat` of every command line: shell blocks, indented ones, steps of workflows."""
    lines = []
    for block in page.blocks():
        if block.language in ("sh", "bash", ""):
            lines += block.text.replace("\\\n", " ").splitlines()
        elif block.language == "yaml" and "jobs" in (loaded := yaml.safe_load(block.text)):
            steps = [step for job in loaded["jobs"].values() for step in job["steps"]]
            lines += [step["run"] for step in steps if "run" in step]
    return [words for line in lines if (words := mobileqat_words(line)) is not None]


def mobileqat_words(line: str) -> list[str] | None:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=\S*|\$|\./emulator\.sh", words[0]):
        words = words[1:]
    if words[:3] == ["python", "-m", "mobileqat"]:
        words = words[2:]
    if not words or words[0] != "mobileqat":
        return None
    end = next((i for i, word in enumerate(words) if word in ("|", ">", "&&")), len(words))
    return words[1:end]


def command_problem(words: list[str], page: Page) -> str | None:
    """Why click would not take a command line, or what its values name that does not exist; nothing is run."""
    try:
        with cli.main.make_context("mobileqat", list(words), resilient_parsing=False) as context:
            name, command, rest = cli.main.resolve_command(context, words[:])
            parameters = command.make_context(name, list(rest), parent=context).params
        return value_problem(parameters, page)
    except click.exceptions.Exit:
        return None  # --help and --version
    except click.ClickException as error:
        return error.format_message()
    except MobileQatError as error:
        return str(error)


def value_problem(parameters: dict, page: Page) -> str | None:
    for target in parameters.get("targets") or ():
        find_row(target)
    for scheme in (parameters.get("scheme"), *(parameters.get("schemes") or ())):
        if scheme:
            get_scheme(scheme)
    source = parameters.get("source")
    if isinstance(source, str) and ":" not in source and source not in SOURCES:
        return f"no data source {source}"
    recipe = parameters.get("recipe")
    if recipe is None:
        return None
    own = {block.file: block.text for block in page.blocks()} | {yaml_name(b): b.text for b in page.blocks()}
    if recipe in own:
        parse_recipe(own[recipe], file=recipe, overrides=parameters["overrides"])
    elif "/" in recipe or "." not in recipe:
        load_recipe(recipe if "/" not in recipe else ROOT / recipe, parameters["overrides"])
    elif recipe not in OTHER_PAGES:
        return f"no page shows {recipe}"
    return None


OTHER_PAGES = ("stripes.yaml", "my.yaml")  # shown in the quickstart, and what readers call theirs


def yaml_name(block: Block) -> str:
    if block.language != "yaml":
        return ""
    loaded = yaml.safe_load(block.text)
    return f"{loaded.get('name')}.yaml"


@pytest.fixture
def data_folder(monkeypatch, tmp_path):
    """Recipes name it; nothing is read from it here."""
    monkeypatch.setenv("MOBILEQAT_DATA", str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name, data_folder):
    page = read(ROOT / name)
    problems = {" ".join(words): command_problem(words, page) for words in commands(page)}
    assert {line: problem for line, problem in problems.items() if problem} == {}


def test_every_command_is_shown_somewhere():
    shown = {words[0] for name in NAMES for words in commands(read(ROOT / name)) if words}
    assert set(cli.main.commands) <= shown


# ------------------------------------------------------------------ YAML and Python


def yaml_problem(block: Block) -> str | None:
    """A whole recipe has to load, a part of one has to fit into a recipe; a workflow has to be YAML."""
    loaded = yaml.safe_load(block.text)
    if "jobs" in loaded:
        return None
    try:
        if "name" in loaded:
            parse_recipe(block.text, file="page")
        else:
            overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in loaded.items()]
            load_recipe("digits_dscnn_w8a8", overrides)
    except RecipeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", NAMES)
def test_yaml_is_valid(name):
    assert [problem for b in read(ROOT / name).blocks() if b.language == "yaml" and (problem := yaml_problem(b))] == []


def write_files(page: Page, folder: Path) -> None:
    for block in page.blocks():
        if block.file:
            (folder / block.file).write_text(block.text)


def run_python(page: Page, name: str, folder: Path) -> None:
    """Runs the Python blocks; a traceback points at the page's own lines."""
    namespace: dict = {"__name__": "page"}
    write_files(page, folder)
    for block in page.blocks():
        if block.language == "python":
            code = compile("\n" * (block.line + 1) + block.text, name, "exec")
            exec(code, namespace)


PYTHON_PAGES = [name for name in NAMES if any(block.language == "python" for block in read(ROOT / name).blocks())]


@pytest.mark.parametrize("name", PYTHON_PAGES)
def test_python_runs(name, tmp_path, monkeypatch):
    import keras

    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    run_python(read(ROOT / name), name, tmp_path)


def test_the_pages_with_code_are_known():
    """So that a page whose blocks are no longer recognized does not drop out unnoticed."""
    known = {"README.md", "docs/quickstart.md", "docs/own-model-and-data.md", "docs/python.md", "docs/tfmot.md"}
    assert known | {"docs/how-qat-works.md", "docs/phone.md"} <= set(PYTHON_PAGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["docs/quickstart.md", "docs/own-model-and-data.md"])
def test_own_model_and_data_as_a_reader_would(name, tmp_path, monkeypatch):
    """Follows the page to the letter: its Python, its files, then its commands, each of which has to succeed."""
    page = read(ROOT / name)
    monkeypatch.chdir(tmp_path)
    run_python(page, name, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = 0
    for words in commands(page):
        if words[0] in ("train", "evaluate", "convert", "inspect") and "digits_dscnn_w8a8" not in words:
            if "runs/digits" in " ".join(words):
                continue
            subprocess.run([sys.executable, "-m", "mobileqat", *words], check=True, env=environment, timeout=600)
            ran += 1
    assert ran >= 2
    assert list(tmp_path.glob("runs/*/report.html"))


# ------------------------------------------------------------------ pictures and the site


def test_pictures_are_what_the_script_draws(tmp_path):
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.main(tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in (ROOT / "docs/images").glob("*.svg")}
    shown = {Path(target).name for target in read(ROOT / "docs/how-qat-works.md").links() if target.endswith(".svg")}
    assert shown == drawn
    # The text of the page says so.
    *_, losses = pictures.toy_training()
    assert min(losses) < losses[0] / 20
    assert pictures.dense_example()["q_out"] == -32


def test_accuracy_figures_are_those_of_the_results():
    command = [sys.executable, str(ROOT / "docs/figures.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}Run: python docs/figures.py"


def test_picture_of_the_report_is_small():
    assert (ROOT / "docs/images/report.png").stat().st_size < 200_000


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("needs MkDocs: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # A proxy that does not answer: whatever is fetched fails.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_site_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    source, sheet = r"<(?:script|img|iframe|source)\b[^>]*\bsrc=", r"<link\b[^>]*\bhref="
    loaded = re.compile(rf"(?:{source}|{sheet})[\"']?(?:https?:)?//")
    assert [str(page) for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not any(re.search(r"(?:url\(|@import )['\"]?(?:https?:)?//", style) for style in styles)


def test_site_has_formulas_pictures_and_docstrings(site):
    theory = (site / "how-qat-works.html").read_text(encoding="utf-8")
    assert theory.count("<math") > 10 and "arithmatex" not in theory
    reference = (site / "api.html").read_text(encoding="utf-8")
    assert all(re.search(rf'id="mobileqat\.[\w.]*\.{name}"', reference) for name in mobileqat.__all__)
    assert "Makes the quantized twin of a float model" in reference
    assert (site / "repository/benchmarks/results/coverage.json").is_file()


# ------------------------------------------------------------------ the checks check

WRONG = {
    "a link to nowhere": ("[x](nowhere.md)", broken_links),
    "an anchor that is none": ("[x](README.md#no-such-heading)", broken_links),
    "a recipe that is none": ("Run `digits_resnet_w8a8`.", unknown_names),
    "a key that is none": ("Set `qat.epoch`.", unknown_names),
    "an option that is none": ("```sh\nmobileqat inspect a.tflite --jason\n```", "command"),
    "a command that is none": ("    mobileqat quantise a.tflite", "command"),
    "a missing argument": ("```sh\nmobileqat verify --data digits\n```", "command"),
    "a target that is none": ("    mobileqat bench a.tflite --target ios", "command"),
    "a source that is none": ("    mobileqat evaluate a.tflite --data imagenet", "command"),
    "an override that is none": ("    mobileqat train digits_dscnn_w8a8 --set qat.epoch=2", "command"),
    "a recipe file that is none": ("    mobileqat train recipes/none.yaml", "command"),
    "a wrong step of a workflow": (
        "```yaml\njobs: {a: {steps: [{run: mobileqat inspect --nothing a.tflite}]}}\n```",
        "command",
    ),
    "a wrong part of a recipe": ("```yaml\nquantize: {schema: w8a8}\n```", "yaml"),
    "a wrong recipe": ("```yaml\nname: a\ndescription: b\ndata: {source: digits}\nmodel: {nam: dscnn}\n```", "yaml"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_pages_are_found(mistake, data_folder):
    text, check = WRONG[mistake]
    page = Page(text, ROOT)
    if check == "command":
        assert any(command_problem(words, page) for words in commands(page))
    elif check == "yaml":
        assert any(yaml_problem(block) for block in page.blocks())
    else:
        assert check(page)


def test_wrong_python_is_found(tmp_path):
    with pytest.raises(AssertionError):
        run_python(Page("<!-- test: setup\nx = 1\n-->\n\n```python\nassert x == 2\n```", ROOT), "page", tmp_path)
