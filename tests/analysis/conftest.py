"""A made-up study of finished runs, and its summary, for tables and figures."""

from pathlib import Path

import pytest

from analysis.collect import collect
from analysis.series import Row, summarize
from tests.studies import write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def summary(study: Path) -> list[Row]:
    return summarize(collect(study))
