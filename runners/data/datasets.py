"""Where texts come from: a data set of the hub or its rows in a folder, and the standard library."""

import json
import logging
import platform
from dataclasses import dataclass
from pathlib import Path

from runners.data.stdlib import Kind, Part, documents
from runners.errors import InputError, MissingData
from runners.hub import hub_answers, why_not
from runners.storage.fingerprint import fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, or, where a data root is given, its rows as JSON lines in `<root>/<folder>/<split>.jsonl`.

    Attributes:
        path: the data set's name on the hub.
        split: which of its splits.
        column: the column that holds the text.
        config: the data set's configuration on the hub.
        data_file: one file of the data set, where the whole would be too large.
        revision: branch, tag or commit on the hub.
    """

    folder: str
    path: str
    split: str
    column: str
    config: str | None = None
    data_file: str | None = None
    revision: str | None = None

    def rows(self, data_root: str | None) -> list[str]:
        """The texts of all rows, in order.

        Raises:
            MissingData: the data set is not there.
            InputError: a row is not as it should be.
        """
        if data_root is not None:
            return self._read(self._file(data_root))
        return self._download()

    def version(self, data_root: str | None) -> str:
        """Which rows these are, for a run's identity: a fingerprint of the file, or the hub's."""
        if data_root is None:
            return "hub"
        file = self._file(data_root)
        return fingerprint([file]) if file.is_file() else "missing"

    def _file(self, data_root: str) -> Path:
        return Path(data_root).expanduser() / self.folder / f"{self.split}.jsonl"

    def _read(self, file: Path) -> list[str]:
        if not file.is_file():
            raise MissingData(
                f"the data set {self.folder} ({self.path}, {self.split}) is not in the data root: there is no {file}. "
                "Put it there as JSON lines, or leave data_root out to take it from the hub"
            )
        rows = []
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            try:
                row = json.loads(line)[self.column]
                row.encode()  # half a surrogate pair is no text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                row = None
            if not isinstance(row, str):
                raise InputError(f"line {number} of {file} is not a JSON object with a text in {self.column!r}")
            rows.append(row)
        return rows

    def _download(self) -> list[str]:
        hub_answers()
        import datasets

        datasets.utils.disable_progress_bars()
        files = {self.split: self.data_file} if self.data_file else None
        try:
            loaded = datasets.load_dataset(
                self.path, self.config, data_files=files, split=self.split, revision=self.revision
            )
            return list(loaded[self.column])
        except Exception as error:  # the hub's client has some twenty ways to say no
            raise MissingData(
                f"the data set {self.folder} ({self.path}, {self.split}) cannot be had from the hub "
                f"({why_not(error)}). Go online, or name a folder that holds {self.folder}/{self.split}.jsonl: "
                f"data_root=FOLDER or QUANTEASE_DATA_ROOT"
            ) from error


@dataclass(frozen=True)
class StandardLibrary:
    """Documents of the standard library of the Python that runs this, see `runners.data.stdlib`.

    Attributes:
        part: `evaluation` or `calibration`.
        kind: `docs` or `source`; None: both.
    """

    part: str
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.part not in ("evaluation", "calibration"):
            raise ValueError(f"part must be evaluation or calibration, not {self.part}")
        if self.kind not in (None, "docs", "source"):
            raise ValueError(f"kind must be docs, source or null, not {self.kind}")

    def rows(self, data_root: str | None) -> list[str]:  # noqa: ARG002 - the library is where Python is
        kinds: list[Kind] = ["docs", "source"] if self.kind is None else [self.kind]  # pyright: ignore[reportAssignmentType]
        part: Part = self.part  # pyright: ignore[reportAssignmentType]
        return [document.text for kind in kinds for document in documents(kind, part)]

    def version(self, data_root: str | None) -> str:  # noqa: ARG002
        """Which text this is, for a run's identity: every version of Python carries another."""
        return f"Python {platform.python_version()}"


Dataset = HubDataset | StandardLibrary
