"""The page in a real browser: Debian's chromium, headless, through selenium and chromium-driver.

Nothing is fetched, nothing is logged, every plot is seen, and all of it works at 390 px and from the keyboard.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_results import make_failed_results, make_graph, make_islands, make_layers, make_results

from mobileqat.report import write_html

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
ChromeService = pytest.importorskip("selenium.webdriver.chrome.service").Service

PLOTS = [
    "tradeoff",
    "accuracy",
    "classes",
    "latency",
    "profile",
    "training-qat",
    "ranges",
    "noise",
    "weights",
    "outputs",
]
DESKTOP, PHONE, PAPER = 1280, 390, 720  # A4 without its margins


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    if os.geteuid() == 0:  # chromium's sandbox does not start for root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options, ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a complete run with islands, whose names are as long as those of nested models."""
    results = make_results()
    results["islands"] = make_islands()
    results["graph"]["operators"] *= 8  # enough rows to scroll
    results["variants"]["qat"]["layers"] += [
        row | {"operator": f"backbone/stage_{index}/very_long_name_of_a_block/expanded_convolution/project"}
        for index, row in enumerate(make_layers())
    ]
    return write_html(results, tmp_path_factory.mktemp("page") / "report.html")


def show(browser: Any, path: Path, width: int = DESKTOP, scheme: str = "light", media: str = "") -> None:
    """Opens a page anew; what was logged before is forgotten."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())


def evaluate(browser: Any, expression: str, *arguments: Any) -> Any:
    return browser.execute_script(f"return {expression}", *arguments)


def requests(browser: Any) -> list[str]:
    """Addresses that the browser asked for since `show`."""
    messages = [json.loads(row["message"])["message"] for row in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def overflow(browser: Any) -> int:
    """By how many pixels the page is wider than the window beside its scrollbar."""
    return evaluate(browser, "document.documentElement.scrollWidth - document.documentElement.clientWidth")


def press(browser: Any, key: str) -> None:
    browser.switch_to.active_element.send_keys(key)


def test_no_request_leaves_the_file_and_the_console_is_silent(browser: Any, page: Path) -> None:
    show(browser, page)
    evaluate(browser, "document.querySelectorAll('details').forEach(details => details.open = true)")
    assert requests(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []


def test_a_request_and_a_message_would_be_noticed(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<img src='missing.png'><script>console.error('broken')</script>")
    show(browser, path)
    assert [url.rsplit("/", 1)[1] for url in requests(browser)] == ["bad.html", "missing.png"]
    assert any("broken" in row["message"] for row in browser.get_log("browser"))


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_verdict_and_table_are_on_the_first_screen(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width)
    assert evaluate(browser, "document.querySelector('h1').innerText").startswith("Ship qat.tflite: 87.30")
    bottom = "document.querySelector(arguments[0]).getBoundingClientRect().bottom"
    assert evaluate(browser, bottom, "h1") < 300
    assert evaluate(browser, bottom, ".comparison tr:nth-child(5)") < 800


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_every_plot_is_seen(browser: Any, page: Path, width: int, scheme: str) -> None:
    show(browser, page, width, scheme)
    sizes = evaluate(
        browser,
        """Object.fromEntries([...document.querySelectorAll('figure')].map(figure => {
            const box = figure.querySelector('svg').getBoundingClientRect();
            return [figure.id.slice('chart-'.length), [box.left, box.width, box.height]];
        }))""",
    )
    assert sorted(sizes) == sorted(PLOTS)
    for name, (left, wide, high) in sizes.items():
        assert wide > 250 and high > 60, name
        assert left >= 0 and left + wide <= width, name
    graph = evaluate(browser, "document.querySelector('.canvas svg').getBoundingClientRect().width")
    assert 250 < graph <= width


def test_text_follows_dark_mode(browser: Any, page: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        show(browser, page, scheme=scheme)
        ink = "getComputedStyle(document.querySelector('#chart-accuracy svg text')).fill"
        colours[scheme] = evaluate(browser, f"[getComputedStyle(document.body).backgroundColor, {ink}]")
    assert colours["light"] == ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
    assert colours["dark"] == ["rgb(20, 23, 27)", "rgb(230, 233, 236)"]


@pytest.mark.parametrize("make", [make_results, make_failed_results])
def test_no_horizontal_overflow_on_a_phone(browser: Any, page: Path, tmp_path: Path, make: Any) -> None:
    for path in (page, write_html(make(), tmp_path / "report.html")):
        show(browser, path, PHONE)
        assert overflow(browser) == 0
        # Wide tables scroll inside their own regions.
        evaluate(browser, "document.querySelectorAll('details').forEach(details => details.open = true)")
        assert overflow(browser) == 0


def test_numbers_open_from_the_keyboard(browser: Any, page: Path) -> None:
    show(browser, page)
    reached: dict[str, bool] = {}
    count = evaluate(browser, "document.querySelectorAll('figure summary').length")
    press(browser, Keys.TAB)
    for _ in range(300):
        is_summary = evaluate(browser, "document.activeElement.matches('figure summary')")
        if is_summary:
            press(browser, Keys.ENTER)
            name = evaluate(browser, "document.activeElement.closest('figure').id")
            reached[name] = evaluate(browser, "document.activeElement.parentElement.open")
        if len(reached) == count or evaluate(browser, "document.activeElement === document.body"):
            break
        press(browser, Keys.TAB)
    assert reached == {f"chart-{name}": True for name in PLOTS}


def test_the_graph_is_enlarged_and_scrolled_from_the_keyboard(browser: Any, page: Path) -> None:
    show(browser, page)
    width = "document.querySelector('.canvas svg').getBoundingClientRect().width"
    before = evaluate(browser, width)
    evaluate(browser, "document.getElementById('zoom-readable').focus()")
    press(browser, Keys.ARROW_RIGHT)
    assert evaluate(browser, "document.activeElement.id") == "zoom-large"
    assert evaluate(browser, width) == pytest.approx(1.5 * before, rel=0.01)
    press(browser, Keys.TAB)
    assert evaluate(browser, "document.activeElement.className") == "canvas"
    press(browser, Keys.END)
    browser.execute_async_script("setTimeout(arguments[0], 300)")  # scrolling is smooth
    assert evaluate(browser, "document.querySelector('.canvas').scrollTop") > 100
    assert overflow(browser) == 0


def test_a_whole_graph_fits(browser: Any, page: Path) -> None:
    show(browser, page)
    evaluate(browser, "document.getElementById('zoom-whole').click()")
    canvas = "document.querySelector('.canvas')"
    assert evaluate(browser, f"{canvas}.scrollHeight <= {canvas}.clientHeight")


def test_what_is_focused_is_seen(browser: Any, page: Path) -> None:
    show(browser, page)
    press(browser, Keys.TAB)
    outline = evaluate(browser, "getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_printed_in_black_on_white_with_everything_unfolded_on_the_paper(browser: Any, page: Path) -> None:
    show(browser, page, PAPER, scheme="dark", media="print")
    assert overflow(browser) == 0
    boxes = "['.comparison', '.first figure'].map(name => document.querySelector(name).getBoundingClientRect())"
    table, figure = evaluate(browser, boxes)
    assert figure["top"] >= table["bottom"] or figure["left"] >= table["right"]
    assert evaluate(browser, "getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert evaluate(browser, "getComputedStyle(document.querySelector('nav')).display") == "none"
    canvas = "document.querySelector('.canvas')"
    assert evaluate(browser, f"{canvas}.scrollHeight <= {canvas}.clientHeight + 1")
    assert evaluate(browser, "document.querySelector('#recipe + details pre').getBoundingClientRect().height") > 20


def test_a_graph_of_long_names_stays_inside_its_boxes(browser: Any, tmp_path: Path) -> None:
    results = make_results()
    results["graph"] = make_graph()
    for tensor in results["graph"]["tensors"].values():
        tensor["name"] = "backbone/stage_1/block_2/" + "W" * 60
    show(browser, write_html(results, tmp_path / "report.html"))
    overflowing = evaluate(
        browser,
        """[...document.querySelectorAll('.canvas g')].filter(group => group.querySelector('rect')).filter(group => {
            const right = group.querySelector('rect').getBoundingClientRect().right;
            return [...group.querySelectorAll('text')].some(text => text.getBoundingClientRect().right > right);
        }).length""",
    )
    assert overflowing == 0
