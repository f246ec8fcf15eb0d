"""The report of a study: its files, its page in a real browser, the command line, and the committed one."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.__main__ import main
from analysis.report import write_report
from tests.conftest import PROJECT
from tests.studies import write_run, write_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
TINY = PROJECT / "results" / "tiny"
TABLES = [
    "comparison.md",
    *(f"perplexity-stdlib_{text}.{kind}" for text in ("docs", "source") for kind in ("md", "tex")),
]
QUIET = ["--disable-gpu", "--no-first-run", "--disable-sync", "--virtual-time-budget=5000", "--window-size=1300,1000"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images].map(image => image.naturalWidth > 0);
  document.body.dataset.shown = images.filter(Boolean).length + " of " + images.length;
  document.body.dataset.overflow = document.documentElement.scrollWidth > innerWidth;
  document.body.dataset.fetched = performance.getEntriesByType("resource").map(entry => entry.name).join(" ");
});</script></body>"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_study(tmp_path_factory.mktemp("studies") / "made <up>")
    write_report(folder)
    return folder


class Links(HTMLParser):
    """Every address in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def test_every_link_of_the_page_leads_to_a_file(study: Path) -> None:
    links = Links((study / "report" / "index.html").read_text()).found
    runs = [link for link in links if link.startswith("../")]
    assert len(runs) > 100
    assert {f"../opt-13b/gptq-3b-{seed}" for seed in (0, 1)} <= set(runs)
    for link in links:
        assert link == "data:," or (study / "report" / link).exists(), link


def test_the_page_shows_what_is_missing_and_where_numbers_were_made(study: Path) -> None:
    page = (study / "report" / "index.html").read_text()
    assert "made &lt;up&gt;" in page
    assert "exception: quantize: OutOfMemoryError: &lt;40 GB&gt;" in page
    assert "skipped: zero_shot/arc" in page
    assert "the data set is missing" in page
    assert "NVIDIA H200" in page
    assert "0123456789" in page


def test_a_report_has_the_same_bytes_every_time_and_no_old_files(tmp_path: Path) -> None:
    for method, ppl in {"rtn": 9.0, "gptq": 8.0}.items():
        labels = {"model": "m", "method": method, "bits": 3, "status": "done", "bits_per_weight": 3.0, "ppl/t": ppl}
        write_run(tmp_path, method, None, **labels)
    folder = write_report(tmp_path)
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "old.png").write_bytes(b"")
    write_report(tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first
    assert {"index.html", "comparison.md", "intervals.csv", "pareto-m.png", "perplexity-t.tex"} <= set(first)
    assert (
        "Left out. Perplexity against model size: it needs models of two sizes or more." in first["index.html"].decode()
    )


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
@pytest.mark.parametrize("which", ["made up", "committed"])
def test_a_browser_shows_the_page_with_all_its_figures_and_fetches_nothing_else(
    which: str, study: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    shutil.copytree((study if which == "made up" else TINY) / "report", folder)
    page = folder / "index.html"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    opened = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            *QUIET,
            f"--user-data-dir={tmp_path / 'p'}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    images = text.count("<img ")
    assert images >= 2
    assert f'data-shown="{images} of {images}"' in opened.stdout, opened.stderr[-1000:]
    assert 'data-overflow="false"' in opened.stdout
    fetched = re.findall(r'data-fetched="([^"]*)"', opened.stdout)[0].split()
    assert all(address.startswith((folder.as_uri(), "data:")) for address in fetched), fetched
    assert len(re.findall(r"<tr[ >]", opened.stdout)) == len(re.findall(r"<tr[ >]", text)) > 30


def test_the_command_prints_the_table_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, bits in (("rtn", 3), ("rtn", 4)):
        labels = {"model": "m", "method": method, "bits": bits, "status": "done", "bits_per_weight": bits, "ppl/t": 9.0}
        write_run(tmp_path, f"{method}{bits}", None, **labels)
    main([str(tmp_path), "bits=3"])
    assert not (tmp_path / "report").exists()
    main([str(tmp_path)])
    assert f"All tables and figures: {tmp_path / 'report' / 'index.html'}" in capsys.readouterr().out
    main(["report", str(tmp_path), "bits=3"])
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Only runs with bits=3" in page
    assert "<td>4</td>" not in page


def test_two_runs_are_compared_by_folder_name_or_digest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PROJECT)
    fp16 = next((TINY / "tiny").glob("fp16-*"))
    gptq = next((TINY / "tiny").glob("gptq-3b-*"))
    main(["compare", str(gptq.relative_to(PROJECT)), fp16.name.split("-")[-1]])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    value, low, high = map(float, re.findall(r"\d+\.\d{4}", said[0]))
    assert 1 < low < value < high
    missing = "missing: second; see python -m analysis compare --help"
    for wrong, sentence in ((["compare", "a"], missing), (["compare", "nono", "nono"], "nono is no run in")):
        with pytest.raises(SystemExit):
            main(wrong)
        assert sentence in capsys.readouterr().err


def test_the_committed_report_is_that_of_the_committed_study(tmp_path: Path) -> None:
    study = tmp_path / "tiny"
    shutil.copytree(TINY, study, ignore=shutil.ignore_patterns("report"))
    fresh = write_report(study)
    for name in TABLES:
        assert (TINY / "report" / name).read_text() == (fresh / name).read_text(), (
            f"{name}: run python -m analysis tiny"
        )
    assert {file.name for file in (TINY / "report").iterdir()} == {file.name for file in fresh.iterdir()}


def test_a_report_that_cannot_be_written_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(
        tmp_path, "a", None, **{"model": "m", "method": "rtn", "bits": 3, "status": "done", "bits_per_weight": 3.0}
    )
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert re.match(r"error: .*report", capsys.readouterr().err)
    assert os.listdir(tmp_path / "m") == ["a"]
