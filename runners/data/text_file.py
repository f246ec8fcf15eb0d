"""A person's own text: a `.txt` file, or JSON lines. Rows of local data sets are read by the same rule.

A file is read and checked when the settings are built, so that a damaged one is known before anything is loaded. It is
known by its content: where it is and what it is called enters no digest.
"""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from runners.errors import InputError
from runners.identity import counts_if

TEXT, JSON_LINES = ".txt", ".jsonl"
HASH_DIGITS = 16


def _has_columns(file: "TextFile") -> bool:
    return Path(file.path).suffix == JSON_LINES


@dataclass(frozen=True)
class TextFile:
    """A local file in UTF-8: `.txt` is one document, of `.jsonl` every line.

    Attributes:
        path: of the file.
        column: in `.jsonl`: the key of the text in every line.

    Raises:
        InputError: the file is missing, empty, binary, not UTF-8, or a line of it is not what it should be.
    """

    path: str = field(metadata=counts_if(lambda _: False))  # `version` is the hash of the content
    column: str = field(default="text", metadata=counts_if(_has_columns))

    def __post_init__(self) -> None:
        self._read()

    def rows(self, data_root: str | None) -> list[str]:  # noqa: ARG002 - needs no data root
        """The documents of the file.

        Raises:
            InputError: as for the class, where the file has changed since.
        """
        return list(self._read()[0])

    def version(self, data_root: str | None) -> str:  # noqa: ARG002
        """Which text this is, for a run's digest: the hash of the file's content."""
        return self._read()[1]

    def _read(self) -> tuple[tuple[str, ...], str]:
        file = Path(self.path).expanduser()
        if file.suffix not in (TEXT, JSON_LINES) and not file.is_dir():
            raise InputError(
                f"{file} is neither {TEXT} nor {JSON_LINES}, which are the texts that can be read: rename it"
            )
        if not file.is_file():
            what = "is a folder, not a file" if file.is_dir() else "does not exist"
            raise InputError(f"the text {file} {what}: name a {TEXT} or {JSON_LINES} file")
        try:
            facts = file.stat()
            return _documents(file, self.column, facts.st_mtime_ns, facts.st_size)
        except OSError as error:
            raise InputError(f"the text {file} cannot be read: {error.strerror}") from None


@lru_cache(maxsize=8)
def _documents(file: Path, column: str, _changed: int, _size: int) -> tuple[tuple[str, ...], str]:
    """The documents of a file and the hash of its content; read once, whatever the number of cells."""
    content = file.read_bytes()
    if b"\0" in content:
        raise InputError(f"{file} is binary, not a text")
    documents = json_rows(file, content, column) if file.suffix == JSON_LINES else [_decoded(file, content)]
    if not any(text.strip() for text in documents):
        raise InputError(f"{file} is empty: there is no text in it")
    return tuple(documents), sha256(content).hexdigest()[:HASH_DIGITS]


def _decoded(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # some editors begin a file with a mark that is no part of its text
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"line {line} of {file} is not UTF-8: convert it, for example with iconv -t UTF-8") from None


def json_rows(file: Path, content: bytes, column: str) -> list[str]:
    """The texts of JSON lines, in order.

    Raises:
        InputError: a line is damaged; the message has its number.
    """
    _decoded(file, content)  # for its sentence, where that is what is wrong
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue  # many editors end a file with an empty line
        try:
            row = json.loads(line)
            text = row[column]
            text.encode()  # JSON allows half a surrogate pair (\ud800), which no tokenizer can encode
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            text = None
        if not isinstance(text, str):
            what = f"line {number} of {file} is not a JSON object with a text in {column!r}"
            raise InputError(what + _other_columns(line, column))
        rows.append(text)
    return rows


def _other_columns(line: bytes, column: str) -> str:
    """For the end of a sentence: the keys of a line that do have texts; "" where there are none, or the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    texts = [key for key, text in row.items() if isinstance(text, str) and key != column] if type(row) is dict else []
    named = ", ".join(f"{key[:40]!r}" for key in texts[:5])
    return f" (it has texts in {named}; for a file of your own, column=NAME chooses)" if texts else ""
