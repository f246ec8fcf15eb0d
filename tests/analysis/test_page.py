"""The page of a report in headless Chromium, as readers use it: sort, filter, point, zoom, hide; on phones, in the dark."""

import math
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.report import write_report
from analysis.tables.summary import NOTHING
from tests.conftest import missing
from tests.studies import write_run, write_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browsing = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
EVIL = "</script><script>document.title='evil'</script><img src=http://example.invalid/x.png>"
CONTRAST = """() => {
  const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const clear = color => /, 0\\)$/.test(color);
  const behind = node => node && clear(getComputedStyle(node).backgroundColor) ? behind(node.parentElement)
    : getComputedStyle(node ?? document.documentElement).backgroundColor;
  return [...document.querySelectorAll("p, h1, h2, td, th, a, figcaption, input, th svg")].map(node => {
    const pair = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05); });
}"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_study(tmp_path_factory.mktemp("pages") / "made up")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason=missing("playwright"))
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def visit(browser: Any, study: Path, width: int = 1300, dark: bool = False) -> Any:
    """The open page; `page.said` is what it wrote to the console, `page.asked` the addresses that it asked for."""
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme="dark" if dark else "light")
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto((study / "report" / "index.html").as_uri())
    page.locator(".chart svg").first.wait_for()
    page.locator(".dt-search").last.wait_for()  # the last table is ready
    return page


def column(page: Any, number: int) -> list[str]:
    """The visible entries of a column of the first table."""
    return page.locator("table.data").first.locator(f"tbody tr td:nth-child({number})").all_inner_texts()


@browsing
def test_nothing_leaves_the_page_and_nothing_goes_wrong(browser: Any, study: Path) -> None:
    page = visit(browser, study)
    assert page.said == []
    assert page.asked
    assert all(address.startswith(("file:", "data:", "blob:")) for address in page.asked)
    page.evaluate("fetch('http://example.invalid/').catch(() => 0)")  # the policy of the page forbids it
    page.wait_for_timeout(100)
    assert any("Content Security Policy" in line for line in page.said)


@browsing
def test_a_click_on_a_head_sorts_by_numbers_and_a_word_filters(browser: Any, study: Path) -> None:
    page = visit(browser, study)
    before = column(page, 5)
    page.locator("table.data").first.locator("thead th").nth(5).click()
    page.wait_for_timeout(200)
    perplexities = [float(words.split()[0]) for words in column(page, 6)]
    assert perplexities == sorted(perplexities)
    assert column(page, 5) != before
    page.locator(".dt-search input").first.fill("gptq 3")
    page.wait_for_timeout(500)
    assert set(column(page, 1)) == {"gptq"}
    assert len(column(page, 1)) < len(before)


@browsing
def test_pointing_at_a_mark_tells_method_bits_and_run_folder(browser: Any, study: Path) -> None:
    page = visit(browser, study)
    page.locator(".chart").first.scroll_into_view_if_needed()
    page.locator(".chart .mark-symbol.role-mark path").first.hover(force=True)
    tooltip = page.locator("#vg-tooltip-element")
    tooltip.wait_for()
    words = tooltip.inner_text()
    for name in ("method", "bits per weight", "grid", "perplexity"):
        assert name in words
    runs = re.findall(r"[\w.-]+/[\w.-]+", words)
    assert runs
    assert all((study / run).is_dir() for run in runs)


@browsing
def test_a_click_in_the_legend_hides_a_method_and_the_wheel_zooms(browser: Any, study: Path) -> None:
    page = visit(browser, study)
    chart = page.locator(".chart").first
    marks = chart.locator(".mark-symbol.role-mark path")
    every = marks.count()
    chart.locator(".role-legend-label text").first.click()
    page.wait_for_timeout(300)
    assert 0 < marks.count() < every
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 150)
    ticks = chart.locator(".role-axis-label").all_text_contents()
    page.keyboard.down("Control")
    for _ in range(4):
        page.mouse.wheel(0, -300)
        page.wait_for_timeout(100)
    page.keyboard.up("Control")
    assert chart.locator(".role-axis-label").all_text_contents() != ticks


@browsing
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
def test_the_page_fits_and_can_be_read(browser: Any, study: Path, width: int, dark: bool) -> None:
    page = visit(browser, study, width, dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("th svg").count() > 0  # the menus of heads are pictures, and have a color of their own
    assert min(page.evaluate(CONTRAST)) > 4.5
    table = page.locator(".dt-layout-table").first
    table.evaluate("node => node.scrollTo(150, 200)")
    place, head, first = (
        table.bounding_box(),
        *(page.locator("table.data").first.locator(cell).first.bounding_box() for cell in ("thead th", "tbody td")),
    )
    assert abs(head["y"] - place["y"]) < 2  # the head stays, and so does the first column
    assert abs(first["x"] - place["x"]) < 2


@browsing
def test_names_from_outside_cannot_leave_the_data_of_a_chart(browser: Any, tmp_path: Path) -> None:
    for method in ("rtn", EVIL):
        labels = {"model": "m", "method": method, "bits": 3, "status": "done", "bits_per_weight": 3.0}
        write_run(tmp_path, f"run{len(method)}", None, **labels, **{f"ppl/{EVIL}": 9.0}, series=method)
    write_report(tmp_path)
    page = visit(browser, tmp_path)
    assert page.title() == f"Study {tmp_path.name}"
    assert page.said == []
    assert not [address for address in page.asked if "invalid" in address]


def test_the_sentence_on_top_claims_what_the_intervals_hold(tmp_path: Path) -> None:
    losses = {"rtn": [2.0, 2.4, 2.2] * 9, "gptq": [1.5, 1.9, 1.7] * 9, "awq": [1.51, 1.88, 1.70] * 9}
    for methods, sentence in (
        (("rtn", "gptq"), r"gptq has the lowest perplexity, 5\.47, 39\.3\s% below that of rtn.*one calibration seed"),
        (("rtn", "gptq", "awq"), r"of the 3 methods.*cannot be told apart"),
        (("rtn",), re.escape(NOTHING)),
    ):
        study = tmp_path / "-".join(methods)
        for method in methods:
            ppl = math.exp(statistics.fmean(losses[method]))
            labels = {"model": "m", "method": method, "bits": 3, "status": "done", "bits_per_weight": 3.0, "ppl/t": ppl}
            write_run(study, method, {"t": losses[method]}, **labels, series=method, seed=0)
        page = (write_report(study) / "index.html").read_text()
        (told,) = re.findall(r'<p class="summary">(.*?)</p>', page)
        assert re.search(sentence, told), told
