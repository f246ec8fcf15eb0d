"""Sources of texts: a data set of the hub, its rows in a local folder, a file, or the standard library of Python."""

import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.data.stdlib import Kind, Part, documents
from runners.data.text_file import TextFile, json_rows
from runners.errors import MissingData
from runners.hub import hub_answers, why_not
from runners.storage.fingerprint import fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub; with a data root, its rows as JSON lines in `<root>/<folder>/<split>.jsonl` instead.

    Attributes:
        folder: its name in a data root.
        path: the data set's name on the hub.
        split: which of its splits.
        column: the column that holds the text.
        config: the data set's configuration on the hub.
        data_file: download only this file of it. C4 is hundreds of GB, and GPTQ's code takes its first file.
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

        Args:
            data_root: folder of data sets; None: the hub, or what is cached of it.

        Raises:
            MissingData: the data set is neither in the data root nor, without one, on the hub.
            InputError: a row is damaged; the message names its line.
        """
        if data_root is not None:
            file = self._present(data_root)
            return json_rows(file, file.read_bytes(), self.column)
        loaded = self._load()
        try:
            return list(loaded[self.column])
        except Exception as error:  # as for `_load`
            raise self._unavailable(error) from error

    def find(self, data_root: str | None) -> None:
        """Look whether the rows can be had, without reading them. Of a hub that answers nothing is asked.

        Raises:
            MissingData: as for `rows`.
        """
        if data_root is not None:
            self._present(data_root)
        elif not hub_answers():
            self._load()

    def version(self, data_root: str | None) -> str:
        """Which rows these are, for a run's digest: a fingerprint of the file, `missing`, or `hub`."""
        if data_root is None:
            return "hub"
        file = self._file(data_root)
        return fingerprint([file]) if file.is_file() else "missing"

    def _file(self, data_root: str) -> Path:
        return Path(data_root).expanduser() / self.folder / f"{self.split}.jsonl"

    def _present(self, data_root: str) -> Path:
        """The file with the rows."""
        file = self._file(data_root)
        if not file.is_file():
            raise MissingData(
                f"the data set {self.folder} ({self.path}, {self.split}) is not in the data root: there is no {file}. "
                "Put it there as JSON lines, or leave data_root out to take it from the hub"
            )
        return file

    def _load(self) -> Any:
        """The data set as `datasets` keeps it: downloaded, or from its cache where the hub does not answer."""
        hub_answers()
        import datasets  # here, because it takes a second and a data root does not need it

        datasets.utils.disable_progress_bars()
        files = {self.split: self.data_file} if self.data_file else None
        try:
            return datasets.load_dataset(
                self.path, self.config, data_files=files, split=self.split, revision=self.revision
            )
        except (
            Exception
        ) as error:  # the hub's client raises many unrelated classes: of its own, of HTTP, of the file system
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> MissingData:
        return MissingData(
            f"the data set {self.folder} ({self.path}, {self.split}) cannot be had from the hub "
            f"({why_not(error)}). Go online, or name a folder that holds {self.folder}/{self.split}.jsonl: "
            f"data_root=FOLDER or QUANTEASE_DATA_ROOT"
        )


@dataclass(frozen=True)
class StandardLibrary:
    """Documents of the standard library of the running Python, see `runners.data.stdlib`.

    Attributes:
        part: `evaluation` or `calibration`; the other two parts trained the bundled model.
        kind: `docs` or `source`; None: both.
    """

    part: str
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.part not in ("evaluation", "calibration"):
            raise ValueError(f"part must be evaluation or calibration, not {self.part}")
        if self.kind not in (None, "docs", "source"):
            raise ValueError(f"kind must be docs, source or null, not {self.kind}")

    def rows(self, data_root: str | None) -> list[str]:  # noqa: ARG002 - needs no data root
        """The texts, ordered as `runners.data.stdlib.documents` orders them, docs before source.

        Raises:
            InputError: this Python has no readable standard library.
        """
        kinds: list[Kind] = ["docs", "source"] if self.kind is None else [self.kind]  # pyright: ignore[reportAssignmentType]
        part: Part = self.part  # pyright: ignore[reportAssignmentType]
        return [document.text for kind in kinds for document in documents(kind, part)]

    def version(self, data_root: str | None) -> str:  # noqa: ARG002
        """Which texts these are, for a run's digest: every version of Python has other ones."""
        return f"Python {platform.python_version()}"


Dataset = HubDataset | StandardLibrary | TextFile
