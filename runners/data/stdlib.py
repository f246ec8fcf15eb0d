"""Text that every Python carries: the language reference and the standard library.

A machine without a data-set hub still has the language reference and the source of the standard library. They are split
into documents, and a hash of a document's name decides which part the document belongs to, so the bundled model is never
evaluated or calibrated on documents that it was trained on. The docstrings and the source of a module share a name, so they
fall into the same part. The docstrings are removed from the source, so no docstring is in both kinds.

Every version of Python has other texts, so their hash and the version of Python are stored with results.
"""

import ast
import os
import sysconfig
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Literal

from runners.errors import InputError

Kind = Literal["docs", "source"]
Part = Literal["train", "validation", "calibration", "evaluation"]

# Of 100 names. Fixed for good: the bundled model was trained on `train`, so another share would let it be evaluated on what
# it has seen.
SHARES: dict[Part, int] = {"evaluation": 10, "calibration": 8, "validation": 2, "train": 80}

# What is no text of this Python: other people's packages, compiled modules, tables of characters (encodings), the wheels of
# ensurepip (_bundled). `pydoc_data` is read by itself, because it holds the language reference as one table.
LEFT_OUT = {"site-packages", "dist-packages", "lib-dynload", "encodings", "pydoc_data", "_bundled", "__pycache__"}
# Debian ships these in separate packages: with them, two machines of one Python version would have different texts.
SPLIT_OFF = {"idlelib", "lib2to3", "tkinter", "turtledemo", "turtle.py"}
TEST_SUITES = {"test", "tests", "idle_test"}  # many distributions leave them out too, so nothing is measured on them

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Holder = ast.stmt | ast.excepthandler | ast.match_case  # of statements; no expression holds any


@dataclass(frozen=True)
class Document:
    """One text and the name whose hash decides which part it belongs to."""

    name: str
    kind: Kind
    text: str


def documents(kind: Kind, part: Part) -> list[Document]:
    """The documents of one kind and part, ordered by the hashes of their names.

    This order mixes the topics, so the first documents (and windows) are a sample of all: by name they would all be from
    modules that begin with "a".

    Raises:
        InputError: this Python has no readable standard library (it is embedded or zipped).
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
    """The part that a document's name falls into; `train` for test suites, which not every Python has."""
    if TEST_SUITES & set(name.split(".")):
        return "train"
    # SHA-256, not Python's hash(), which changes from process to process. Four bytes are enough for an even split.
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
            continue  # before it is parsed: a run needs at most 18 of 100 names
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # the test suites contain files that are malformed on purpose
        docstrings, source = _separate(text, tree)
        if docstrings:
            yield Document(name, "docs", "\n\n".join(docstrings))
        if source:
            yield Document(name, "source", source)


@lru_cache
def _files(root: Path) -> tuple[Path, ...]:
    """All Python files below a folder, sorted, without what LEFT_OUT and SPLIT_OFF name and what the build generated.

    `config-*` and `_sysconfigdata*` hold the settings of the machine that this Python was built on.
    """
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT | SPLIT_OFF and not name.startswith("config-")]
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return tuple(
        sorted(path for path in found if path.name not in SPLIT_OFF and not path.name.startswith("_sysconfigdata"))
    )


def _separate(text: str, tree: ast.Module) -> tuple[list[str], str]:
    """The docstrings of a module, without their indentation, and its source without the lines of its docstrings."""
    lines: list[str | None] = list(text.split("\n"))
    docstrings = []
    for node in _statements(tree):
        if isinstance(node, _Documented) and (docstring := ast.get_docstring(node)):
            docstrings.append(docstring.strip())
            first = node.body[0]
            for line in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[line] = None
    return docstrings, "\n".join(line for line in lines if line is not None).strip()


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of a module in the order of `ast.walk`, without expressions, which are most of them."""
    nodes: deque[ast.AST] = deque([tree])
    while nodes:
        node = nodes.popleft()
        yield node
        for field in node._fields:
            children = getattr(node, field)
            if isinstance(children, list):
                nodes.extend(child for child in children if isinstance(child, _Holder))


def _hash(name: str) -> bytes:
    return sha256(name.encode()).digest()
