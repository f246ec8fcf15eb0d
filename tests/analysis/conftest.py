"""A made-up study of finished runs, and its summary, for tables and figures."""

from pathlib import Path

import pytest

from analysis.collect import collect
from analysis.report import write_report
from analysis.series import Row, summarize
from tests.studies import write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up study with its report, which takes long to draw: for tests that only look at it."""
    folder = write_study(tmp_path_factory.mktemp("reported") / "made <up>")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def summary(study: Path) -> list[Row]:
    return summarize(collect(study))
