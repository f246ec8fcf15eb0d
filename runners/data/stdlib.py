"""Text that every Python carries: the language reference and the standard library.

A machine without a data-set hub still has some 10 MB of English and Python on its disk. They are cut into documents,
and a hash of the document's name decides, once and for all, which part a document belongs to: what is evaluated or
calibrated on is never what the bundled model was trained on. A module's docstrings and its source share a name, so
they always fall into the same part; the source has its docstrings cut out, so no sentence stands in both kinds.

Pythons differ in their library, so a result on these texts carries their hash and the version of Python.
"""

import ast
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Literal

from runners.errors import InputError

Kind = Literal["docs", "source"]
Part = Literal["train", "validation", "calibration", "evaluation"]

SHARES: dict[Part, int] = {"evaluation": 10, "calibration": 8, "validation": 2, "train": 80}  # of 100 names

# Tables and installers rather than text, and what distributions split off into packages of their own.
LEFT_OUT = {"site-packages", "dist-packages", "lib-dynload", "encodings", "pydoc_data", "_bundled", "__pycache__"}
SPLIT_OFF = {"idlelib", "lib2to3", "tkinter", "turtledemo", "turtle.py"}
TEST_SUITES = {"test", "tests", "idle_test"}

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One text and the name that decides which part it belongs to."""

    name: str
    kind: Kind
    text: str


def documents(kind: Kind, part: Part) -> list[Document]:
    """The documents of one kind and part, in the order of their names' hashes (so that the first are a fair sample).

    Raises:
        InputError: this Python carries no readable standard library (an embedded or zipped one).
    """
    chosen = [document for document in _part(part) if document.kind == kind]
    if not chosen:
        raise InputError(
            f"this Python carries no readable standard library in {sysconfig.get_path('stdlib')}, so it has no text for "
            "stdlib: take another Python, or another calibration and evaluation text"
        )
    return sorted(chosen, key=lambda document: _hash(document.name))


@lru_cache
def _part(part: Part) -> tuple[Document, ...]:
    return (*_language_reference(part), *_modules(Path(sysconfig.get_path("stdlib")), part))


def part_of(name: str) -> Part:
    """The part that a document's name falls into. Test suites, where a Python carries them, only train."""
    if TEST_SUITES & set(name.split(".")):
        return "train"
    place = int.from_bytes(_hash(name)[:4], "big") % 100
    for part, share in SHARES.items():
        if place < share:
            return part
        place -= share
    raise AssertionError("the shares add up to 100")


def _language_reference(part: Part) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        if part_of(name := f"reference:{topic}") == part:
            yield Document(name, "docs", text.strip())


def _modules(root: Path, part: Part) -> Iterator[Document]:
    for path in _files(root):
        name = ".".join(path.relative_to(root).parts).removesuffix(".py").removesuffix(".__init__")
        if part_of(name) != part:
            continue  # before it is read: the parts that a run needs are a fifth of the library
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # the test suites contain files that are broken on purpose
        docstrings, source = _separate(text, tree)
        if docstrings:
            yield Document(name, "docs", "\n\n".join(docstrings))
        if source:
            yield Document(name, "source", source)


@lru_cache
def _files(root: Path) -> tuple[Path, ...]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT | SPLIT_OFF and not name.startswith("config-")]
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return tuple(
        sorted(path for path in found if path.name not in SPLIT_OFF and not path.name.startswith("_sysconfigdata"))
    )


def _separate(text: str, tree: ast.Module) -> tuple[list[str], str]:
    """The docstrings of a module, cleaned, and its source without them."""
    lines: list[str | None] = list(text.split("\n"))
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and (docstring := ast.get_docstring(node)):
            docstrings.append(docstring.strip())
            first = node.body[0]
            for line in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[line] = None
    return docstrings, "\n".join(line for line in lines if line is not None).strip()


def _hash(name: str) -> bytes:
    return sha256(name.encode()).digest()
