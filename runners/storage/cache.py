"""Tensors that several runs need, computed once: safetensors files named by the hash of everything that they depend on.

A file is valid only with its marker, a JSON file of the same name that holds its checksum. The folder is bounded in size,
and its oldest files are removed first. A file that is damaged or gone is computed again, so the folder may be deleted at
any time.
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
        limit_gb: the largest size of the folder, in units of 10^9 bytes.

    Attributes:
        hits: how often `get` has found its tensors.
        misses: how often it has not.
    """

    def __init__(self, folder: Path | None, limit_gb: float) -> None:
        self.hits = 0
        self.misses = 0
        self._folder = folder
        self._limit = limit_gb * 1e9

    def get(self, key: dict[str, Any], device: str) -> dict[str, Tensor] | None:
        """The tensors that were put under `key`, on `device`; None if they are missing or damaged."""
        tensors = None if self._folder is None else self._read(self._folder / _name(key), device)
        if tensors is None:
            self.misses += 1
        else:
            self.hits += 1
        return tensors

    def put(self, key: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep the tensors, unless they alone exceed the folder's limit. An error is only logged: the cache is optional."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._folder is None or size > self._limit:
            return
        file = self._folder / _name(key)
        try:
            self._make_room(size)
            write_tensors(file, tensors)
            # The marker last: without it the file counts for nothing, so a kill in between costs time and no number. The
            # checksum is read back from the disk, not taken from memory, and so sees a write that went wrong.
            write(file.with_suffix(".json"), json.dumps({"sha256": file_sha256(file), "key": key}, indent=2))
        except Exception as error:  # whatever it is, the run can do without
            log.warning("%s is not kept for other runs: %s", file, error)
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def _read(self, file: Path, device: str) -> dict[str, Tensor] | None:
        try:
            marker = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            if marker["sha256"] != file_sha256(file):
                raise ValueError("its checksum does not match")
            return load_file(file, device)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("%s is damaged (%s): computing it again", file, error)
            return None

    def _make_room(self, size: int) -> None:
        """Remove the oldest files until `size` bytes more are within the limit."""
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
            # The marker first, for the same reason that it is written last.
            file.with_suffix(".json").unlink(missing_ok=True)
            file.unlink(missing_ok=True)
            total -= taken


def _name(key: dict[str, Any]) -> str:
    return sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32] + ".safetensors"
