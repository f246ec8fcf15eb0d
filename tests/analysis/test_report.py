"""The report of a study: its files, its page in a real browser, the command line, and the committed one."""

import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from analysis.__main__ import _run, main
from analysis.report import write_report
from analysis.tables.libraries import datatables, vega
from runners import project
from runners.errors import InputError
from runners.results.studies import remember
from tests.conftest import PROJECT
from tests.studies import write_run

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


class Links(HTMLParser):
    """Every address in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def test_every_link_of_the_page_leads_to_a_file(reported: Path) -> None:
    links = Links((reported / "report" / "index.html").read_text()).found
    runs = [link for link in links if link.startswith("../")]
    assert len(runs) > 100
    assert {f"../opt-13b/gptq-3b-{seed}" for seed in (0, 1)} <= set(runs)
    for link in links:
        assert link == "data:," or link.startswith("#part-") or (reported / "report" / link).exists(), link


def test_the_page_shows_what_is_missing_and_where_numbers_were_made(reported: Path) -> None:
    page = (reported / "report" / "index.html").read_text()
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
    which: str, reported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    shutil.copytree((reported if which == "made up" else TINY) / "report", folder)
    page = folder / "index.html"
    text = page.read_text(encoding="utf-8")
    page.write_text(PROBE.join(text.rsplit("</body>", 1)), encoding="utf-8")  # a library has such a string too
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
    images = len(re.findall(r'^<img src="', text, re.MULTILINE))  # in place of those of <noscript> there are charts
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
    page = (tmp_path / "report-bits=3" / "index.html").read_text()
    assert "Only runs with bits=3" in page
    four = re.compile(r"<td[^>]*>4</td>")
    assert not four.search(page)
    assert four.search((tmp_path / "report" / "index.html").read_text())


def small_study(study: Path, *methods: str, bits: int = 3) -> Path:
    for method in methods:
        labels = {"model": "m", "method": method, "bits": bits, "status": "done", "bits_per_weight": 3.0, "ppl/t": 9.0}
        names = {"digest": f"{method}{bits}", "series": f"{method}{bits}"}
        write_run(study, f"{method}-{bits}b-{method}{bits}", None, **labels, **names)
    return study


def test_a_report_on_some_runs_leaves_that_on_all_as_it_is(tmp_path: Path) -> None:
    study = small_study(tmp_path / "s", "rtn", "gptq", "awq")
    whole = {file.name: file.read_bytes() for file in write_report(study).iterdir()}
    some = write_report(study, {"method": "rtn,gptq", "bits": "3"})
    assert some == study / "report-bits=3,method=gptq+rtn"
    assert some == write_report(study, {"bits": "3", "method": "gptq,rtn"})  # the order says nothing
    assert "awq" not in (some / "comparison.md").read_text()
    assert {file.name: file.read_bytes() for file in (study / "report").iterdir()} == whole


def test_any_condition_names_a_folder_of_its_own_below_the_study(tmp_path: Path) -> None:
    study = tmp_path / "s"
    values = ["a/../../b", "a_.._.._b", "a b", "a:b", "x" * 300, "x" * 301, "ü"]
    for value in values:
        labels = {"model": "m", "method": "rtn", "bits": 3, "status": "done", "bits_per_weight": 3.0, "ppl/t": 9.0}
        write_run(study, f"run{values.index(value)}", None, **labels, calibration=value, series=value)
    folders = {write_report(study, {"calibration": value}) for value in values}
    assert len(folders) == len(values)
    assert {folder.parent for folder in folders} == {study}
    assert all(re.fullmatch(r"[\w.,=+-]{1,130}", folder.name, re.ASCII) for folder in folders)


def test_several_studies_share_a_table_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = small_study(tmp_path / "first", "rtn", "gptq")
    second = small_study(small_study(tmp_path / "second", "rtn"), "awq", bits=4)
    main([str(first), str(second)])
    printed = capsys.readouterr().out
    assert [line.split("|")[4].strip() for line in printed.splitlines()[2:5]] == ["awq", "rtn", "gptq"]
    folder = tmp_path / "first+second" / "report"
    assert f"All tables and figures: {folder / 'index.html'}" in printed
    links = Links((folder / "index.html").read_text()).found
    assert {link for link in links if link.startswith("../")} >= {
        "../../first/m/gptq-3b-gptq3",
        "../../second/m/awq-4b-awq4",
    }
    assert all(link == "data:," or link.startswith("#part-") or (folder / link).exists() for link in links)
    assert not (first / "report").exists()
    main([str(first), str(first / ".." / "first"), "method=rtn"])  # twice the same
    assert "rtn" in capsys.readouterr().out


def test_a_run_is_found_by_how_its_name_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(project, "ROOT", tmp_path)
    small_study(tmp_path / "results" / "night", "gptq", "gptq_quantease", "rtn")
    (found,) = [_run("gptq_")]
    assert found.name == "gptq_quantease-3b-gptq_quantease3"
    assert _run("rtn3") == _run("rtn-3b-rtn3")
    assert _run("gptq3").name == "gptq-3b-gptq3"
    for word, sentence in (
        ("gptq", r"gptq fits 2 runs: \S+/night/m/gptq-3b-gptq3, \S+/night/m/gptq_quantease-3b-\S+\. Name more"),
        ("spqr", rf"spqr is no run in {tmp_path}/results: name a run's folder"),
        ("", "is no run in"),
    ):
        with pytest.raises(InputError, match=sentence):
            _run(word)
    with pytest.raises(SystemExit):
        main(["nigt"])
    assert (
        capsys.readouterr().err
        == f"error: there is no study nigt in {tmp_path}/results: did you mean night? There are night\n"
    )


def test_without_a_name_the_study_that_was_run_last_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(project, "ROOT", tmp_path)
    for name in ("night", "day"):
        remember(small_study(tmp_path / "results" / name, "rtn" if name == "day" else "gptq"))
    for folder in (Path.cwd(), tmp_path):  # wherever the command is given
        monkeypatch.chdir(folder)
        main(["method=rtn"])
        printed = capsys.readouterr().out
        assert printed.startswith(f"study: day (the last that was run in {tmp_path}/results)\n")
        assert "gptq" not in printed


HOSTILE = "<b>a|b & 100% $x$ #_{~^\\}"  # as the name of a text or a model may be


def test_names_and_messages_from_outside_are_text_in_every_format(tmp_path: Path) -> None:
    for method in ("rtn", "gptq"):
        labels = {
            "model": HOSTILE,
            "method": method,
            "bits": 3,
            "status": "done",
            "bits_per_weight": 3.0,
            "parameters": 9,
        }
        text = {f"ppl/{HOSTILE}": math.exp(2.0), f"protocol/{HOSTILE}": "gptq", f"windows/{HOSTILE}": 3}
        write_run(tmp_path, f"{method}; <i>", {HOSTILE: [1.0, 2.0, 3.0]}, **labels, **text, series=method)
    failed = {"model": HOSTILE, "method": "awq", "bits": 3, "status": "failed", "stage": "load"}
    write_run(tmp_path, "awq", None, **failed, error="one | two\n<script>alert(1)</script> [red]")
    folder = write_report(tmp_path)
    whole = (folder / "index.html").read_text()
    page = whole
    for library in (vega(), *datatables()):
        assert page.count(library) == 1
        page = page.replace(library, "")
    assert page.count("<script") == page.count("</script") == 3  # ours: tables, Vega, charts
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for link in Links(whole).found:
        assert link == "data:," or link.startswith("#part-") or (folder / unquote(link)).exists(), link
    rows = [line for line in (folder / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert all("<b>" not in file.read_text() for file in folder.glob("*.md"))
    for file in folder.glob("*.tex"):
        lines = file.read_text().splitlines()
        assert lines[0].startswith("%")
        rest = "\n".join(lines[1:])
        assert not re.search(r"(?<!\\)[%#_]", rest)
        assert len(re.findall(r"(?<!\\)\{", rest)) == len(re.findall(r"(?<!\\)\}", rest))
        cells = {len(re.findall(r"(?<!\\)&", line)) for line in lines if line.endswith(r"\\")}
        assert len(cells) == 1


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
