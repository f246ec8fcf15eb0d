"""What runs share: whole, checked, bounded, and never needed."""

import os
from pathlib import Path

import pytest
import torch

from runners.storage.cache import Cache

KEY = {"model": "m", "block": 1}


def put(cache: Cache, number: int, size: int = 1000) -> None:
    cache.put({"number": number}, {"x": torch.full((size,), float(number))})


def test_what_was_put_is_found_again_and_counted(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1.0)
    assert cache.get(KEY, "cpu") is None
    cache.put(KEY, {"a": torch.arange(5.0), "b": torch.ones(2, 3)})
    found = Cache(tmp_path, 1.0).get(dict(reversed(KEY.items())), "cpu")
    assert found is not None
    assert torch.equal(found["a"], torch.arange(5.0))
    assert cache.get(KEY | {"block": 2}, "cpu") is None
    assert (cache.hits, cache.misses) == (0, 2)


def test_without_a_folder_nothing_is_kept() -> None:
    cache = Cache(None, 1.0)
    cache.put(KEY, {"a": torch.ones(1)})
    assert cache.get(KEY, "cpu") is None


def test_the_oldest_goes_first_and_the_size_is_bounded(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10_000e-9)
    for number in range(4):  # each takes a little more than 4,000 bytes
        put(cache, number)
        for file in tmp_path.glob("*.safetensors"):  # the clock is coarser than the loop
            before = file.stat().st_mtime_ns - 10**9
            os.utime(file, ns=(before, before))
    found = [cache.get({"number": number}, "cpu") is not None for number in range(4)]
    assert found == [False, False, True, True]
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 10_000
    put(cache, 9, size=10_000)  # alone more than all
    assert cache.get({"number": 9}, "cpu") is None
    assert cache.get({"number": 3}, "cpu") is not None


@pytest.mark.parametrize("damage", ["flip", "truncate", "marker", "no marker"])
def test_what_is_damaged_is_computed_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path, 1.0)
    cache.put(KEY, {"a": torch.arange(100.0)})
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-8])
    elif damage == "marker":
        file.with_suffix(".json").write_text("{")
    else:
        file.with_suffix(".json").unlink()
    assert cache.get(KEY, "cpu") is None
    assert ("is damaged" in caplog.text) == (damage != "no marker")


def test_a_full_disk_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    Cache(tmp_path / "cache", 1.0).put(KEY, {"a": torch.ones(1)})
    assert "is not kept for other runs" in caplog.text
