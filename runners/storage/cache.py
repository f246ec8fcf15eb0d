"""Tensors that several runs need, computed once: safetensors files under the hash of all that they depend on.

A file counts only with its marker, which is written last and holds the file's checksum. The folder is bounded in size;
what was made first goes first. What is damaged or gone is computed again, so the folder may be deleted at any time.
"""

import json
import logging
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from runners.storage.files import write, write_tensors
from runners.storage.fingerprint import file_sha256

log = logging.getLogger(__name__)


class Cache:
    """A folder of tensors, shared by all runs.

    Args:
        folder: None: nothing is kept.
        limit_gb: what the folder may hold, in units of 10^9 bytes.
    """

    def __init__(self, folder: Path | None, limit_gb: float) -> None:
        self.hits = 0
        self.misses = 0
        self._folder = folder
        self._limit = limit_gb * 1e9

    def get(self, key: dict[str, Any], device: str) -> dict[str, Tensor] | None:
        """The tensors that were put under `key`, on `device`; None if they are not there, or damaged."""
        tensors = None if self._folder is None else self._read(self._folder / _name(key), device)
        if tensors is None:
            self.misses += 1
        else:
            self.hits += 1
        return tensors

    def put(self, key: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep the tensors, unless they alone are more than the folder may hold; a full disk is no error."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._folder is None or size > self._limit:
            return
        file = self._folder / _name(key)
        try:
            self._make_room(size)
            write_tensors(file, tensors)
            write(file.with_suffix(".json"), json.dumps({"sha256": file_sha256(file), "key": key}, indent=2))
        except Exception as error:  # the run does not need it
            log.warning("%s is not kept for other runs: %s", file, error)
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def _read(self, file: Path, device: str) -> dict[str, Tensor] | None:
        try:
            marker = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            if marker["sha256"] != file_sha256(file):
                raise ValueError("its checksum is another")
            return load_file(file, device)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("%s is damaged (%s): computing it again", file, error)
            return None

    def _make_room(self, size: int) -> None:
        if self._folder is None or not self._folder.is_dir():
            return
        entries = []
        for file in self._folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another run has just removed it
                status = file.stat()
                entries.append((status.st_mtime_ns, status.st_size, file))
        total = sum(entry[1] for entry in entries)
        for _, taken, file in sorted(entries):
            if total + size <= self._limit:
                return
            file.with_suffix(".json").unlink(missing_ok=True)
            file.unlink(missing_ok=True)
            total -= taken


def _name(key: dict[str, Any]) -> str:
    return sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32] + ".safetensors"
