"""trackio's store, `results/trackio/`: `<project>.db` in SQLite for each study, and figures in `media/<project>/<run>/`.

It is read here without trackio, which need not be installed; only trackio itself takes runs out of it.
"""

import os
import sqlite3
from collections.abc import Collection
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from runners.errors import InputError
from runners.tracking import content

RUNS = "SELECT run_name FROM metrics UNION SELECT run_name FROM configs"
LOGGED = "SELECT CAST(metrics AS TEXT) AS logged FROM metrics WHERE logged LIKE '%file_path%'"  # as JSON, in bytes


def store_of(results: Path) -> Path:
    """The one store of all studies of a results folder."""
    return (results / "trackio").absolute()


def project_of(study: str) -> str:
    """The study in the characters that trackio keeps: studies that differ in others would share their runs."""
    return content.identifier(study, allowed="A-Za-z0-9_-")


def open_store(store: Path) -> None:
    """Have trackio use this store.

    Raises:
        ValueError: it has another one already in this process.
    """
    os.environ["TRACKIO_DIR"] = str(store)  # read once, when trackio is imported
    from trackio.utils import TRACKIO_DIR

    if store != TRACKIO_DIR:
        raise ValueError(f"trackio already writes to {TRACKIO_DIR}: a process can have one results folder")


class Project:
    """The part of a store that is one study's."""

    def __init__(self, study: Path) -> None:
        self.store, self.name = store_of(study.parent), project_of(study.name)
        self.database = self.store / f"{self.name}.db"
        self.media = self.store / "media" / self.name

    @property
    def paths(self) -> list[Path]:
        """All its files and folders."""
        database = [self.store / f"{self.name}.{ending}" for ending in ("db", "db-wal", "db-shm", "lock")]
        return [path for path in (*database, self.media) if path.exists()]

    def runs(self) -> list[str]:
        """The names of its runs.

        Raises:
            InputError: the database cannot be read.
        """
        return sorted(str(name) for (name,) in self._rows(RUNS))

    def unused_figures(self) -> list[Path]:
        """Figures of a run that has others instead: trackio leaves them behind when a run is made again.

        Raises:
            InputError: the database cannot be read.
        """
        mentioned = "".join(str(logged) for (logged,) in self._rows(LOGGED))
        unused: list[Path] = []
        for run in self.media.glob("*/"):
            files = [file for file in sorted(run.rglob("*")) if file.is_file()]
            others = [file for file in files if file.name not in mentioned]
            # A run that mentions none may be about to.
            unused += others if len(others) < len(files) else []
        return unused

    def forget(self, names: Collection[str]) -> None:
        """Take runs out of the database, which then takes less room.

        Raises:
            InputError: trackio is not installed, or does not do it.
        """
        if find_spec("trackio") is None:
            raise InputError(
                f"only trackio takes runs out of {self.database}, and it is not installed: "
                'pip install "quantease-bench[dashboard]"'
            )
        open_store(self.store)
        import trackio

        for run in [run for run in trackio.Api().runs(self.name) if run.name in names]:
            if not run.delete():
                raise InputError(f"trackio has not taken {run.name} out of {self.database}: try again later")
        self._rows("VACUUM")

    def _rows(self, sql: str) -> list[tuple[object, ...]]:
        if not self.database.is_file():
            return []
        try:
            # Not read-only: that would leave two files behind, which whoever closes the database last cleans up.
            with closing(sqlite3.connect(self.database)) as opened:
                return opened.execute(sql).fetchall()
        except sqlite3.Error as error:
            raise InputError(
                f"{self.database} cannot be read or written ({error}): is it in use, or damaged?"
            ) from error
