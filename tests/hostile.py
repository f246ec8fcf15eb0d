"""How files come to harm, and what may come of reading them: a sentence or a correct answer."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from runners.errors import InputError


def examples(count: int) -> Callable[[Any], Any]:
    """So many examples, the same every time; a slow machine fails none of them."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=checks)


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.integers()
    extremes = st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**30, 1e308, "NaN", "inf", "os.system", "../x", "\ud800"])
    return st.recursive(
        leaves | extremes,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )


@st.composite
def damage(draw: st.DrawFn, whole: bytes, within: int | None = None) -> bytes:
    """The bytes cut off somewhere, or with some bits flipped, in the first `within` bytes."""
    place = st.integers(0, min(within or len(whole), len(whole)) - 1)
    if draw(st.booleans()):
        return whole[: draw(place)]
    flipped = bytearray(whole)
    for at in draw(st.lists(place, min_size=1, max_size=3, unique=True)):
        flipped[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(flipped)


def sentence(read: Callable[[], Any], errors: type[Exception] | tuple[type[Exception], ...] = InputError) -> Any:
    """What `read` returns, or None where it says in a sentence why not. Anything else that it raises gets out."""
    try:
        return read()
    except errors as refused:
        error = refused
    assert isinstance(error, InputError) or type(error) in (ValueError, FileNotFoundError)
    assert len(str(error).split()) > 3
    assert "\n" not in str(error)
    return None


@contextmanager
def copy_of(folder: Path, **files: bytes | str | None) -> Iterator[Path]:
    """A copy of a checkpoint, with some files replaced (None: removed); dots in their names are written as `__`."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(folder, Path(place) / "model"))
        for name, content in files.items():
            file = copy / name.replace("__", ".")
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        yield copy


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def pack(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data
