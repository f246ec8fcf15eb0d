"""Finished blocks: the quantized decoder blocks of a run on disk, from which an interrupted run resumes.

`checkpoint/identity.json` names all that the blocks depend on. Each finished block is a safetensors file with its codes,
scales, zero points and outliers, and a manifest with that file's checksum, the records of its layers, its index and the
digest of the run's identity. The manifest is written last: a block is finished if and only if its manifest is there, the
checksums are right, and it is that of this place and this run. Two blocks that were exchanged on disk are not.

Index and digest are not in the safetensors file: `checkpoint/sha256` compares the codes of runs, whatever code made them.
"""

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from quantease.layer import QuantizedLayer
from runners.errors import InputError
from runners.quantization.packing import pack, unpack
from runners.results.layers import LayerRecord
from runners.storage.files import write, write_tensors
from runners.storage.fingerprint import file_sha256

log = logging.getLogger(__name__)

FOLDER = "checkpoint"
IDENTITY = "identity.json"  # in it


@dataclass(frozen=True)
class Manifest:
    """What a run needs to know of a finished block to continue as if it had just quantized it.

    Attributes:
        sha256: checksum of the block's safetensors file.
        records: results of its layers.
        memory: `Memory.state` at the end of the block.
        seconds: spent on the block, by phase.
        peak_memory_gb: the most that the process had taken, from when it began to quantize to the end of the block.
    """

    sha256: str
    records: list[LayerRecord]
    memory: dict[str, Any]
    seconds: dict[str, float]
    peak_memory_gb: float = 0.0  # absent from older manifests


class FinishedBlocks:
    """The finished blocks of one run, from the first decoder block on without a gap.

    Args:
        folder: of the run.
        identity: all that must be the same for a run to resume, by name; goes into JSON.

    Attributes:
        manifests: one per finished block, in order.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder / FOLDER
        self.identity = identity
        self.manifests: list[Manifest] = []

    def resume(self, *, any_version: bool = False) -> int:
        """Find the blocks that an earlier process has finished; a damaged one and all after it are quantized again.

        Args:
            any_version: also take the blocks of older versions, which name neither their run nor, but for their records,
                their place: only where `sha256` is then compared with that of the run's metrics.

        Returns:
            How many blocks need not be quantized again.

        Raises:
            InputError: the blocks belong to other settings, code, libraries, model or calibration data.
        """
        file = self.folder / IDENTITY
        if not file.exists():  # without it, nobody can tell what the blocks depend on
            delete_finished_blocks(self.folder.parent)
            write(file, json.dumps(self.identity, indent=2) + "\n")
            return 0
        self._refuse_another(file)
        while (manifest := self._manifest(len(self.manifests), any_version)) is not None:
            self.manifests.append(manifest)
        return len(self.manifests)

    def save(self, index: int, layers: dict[str, QuantizedLayer], manifest: dict[str, Any]) -> None:
        """Write a finished block: its tensors first, then its manifest.

        Args:
            index: of the decoder block.
            layers: its quantized layers; those that keep their own weights are not among them.
            manifest: fields of `Manifest`, all but the checksum.
        """
        # The order is the guarantee: a process killed in between leaves a file without a manifest, which does not count.
        tensors, metadata = pack(layers)
        write_tensors(self._file(index), tensors, metadata)
        whole = Manifest(sha256=file_sha256(self._file(index)), **manifest)
        content = dataclasses.asdict(whole)
        # The manifest's own checksum: a record that was changed on disk would otherwise become a result.
        content |= self._place(index)
        sealed = {"content": content, "checksum": _checksum(content)}
        write(self._file(index).with_suffix(".json"), json.dumps(sealed) + "\n")
        self.manifests.append(whole)

    def layers(self, index: int, device: str) -> dict[str, QuantizedLayer]:
        """The quantized layers of finished block `index` on `device`, without those that kept their own weights."""
        with safe_open(self._file(index), framework="pt", device=device) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
            return unpack(tensors, opened.metadata())

    @property
    def sha256(self) -> str:
        """The digest of the whole quantized checkpoint: of the finished blocks' digests, in order."""
        return sha256("".join(manifest.sha256 for manifest in self.manifests).encode()).hexdigest()

    @property
    def peak_memory_gb(self) -> float:
        """The most that any of the processes has taken that have finished blocks; 0 without any."""
        return max((manifest.peak_memory_gb for manifest in self.manifests), default=0.0)

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _place(self, index: int) -> dict[str, Any]:
        """Where a block belongs: its index and its run."""
        return {"block": index, "run": _checksum(self.identity)}

    def _manifest(self, index: int, any_version: bool) -> Manifest | None:
        file = self._file(index)
        try:
            sealed = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            written = sealed["content"]
            if _checksum(written) != sealed["checksum"]:
                raise ValueError("the checksum of its manifest is another")
            place = {name: written.pop(name, None) for name in self._place(index)}
            if place != self._place(index) and not (any_version and set(place.values()) == {None}):
                raise ValueError(_not_here(place["block"], index))
            records = [
                LayerRecord(**(record | {"history": tuple(record["history"])})) for record in written.pop("records")
            ]
            if any(record.block != index for record in records):
                raise ValueError(_not_here(records[0].block, index))
            manifest = Manifest(records=records, **written)
            if file_sha256(file) != manifest.sha256:
                raise ValueError("its checksum is another")
            self.layers(index, "cpu")  # a right checksum of a file that this version cannot read is of no use
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            # ValueError: no JSON, or no text at all; RuntimeError: JSON nested too deeply, or tensors of another shape
            log.warning("block %d in %s is damaged (%s): going on from the block before it", index, self.folder, error)
            return None
        return manifest

    def _refuse_another(self, file: Path) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            different = [name for name in self.identity if found.get(name) != self.identity[name]]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{file} is damaged ({error}): start this run again with force=true") from error
        if different:
            name = different[0]
            raise InputError(
                f"{self.folder} holds blocks of an unfinished run with another {name} "
                f"({_short(found.get(name))}, now {_short(self.identity[name])}): going on would mix the two. Go back to "
                "that, or start this run again with force=true"
            )


def delete_finished_blocks(folder: Path) -> None:
    """Delete the finished blocks of a run, given its folder."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _checksum(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _not_here(block: int | None, index: int) -> str:
    return "it is of another run" if block in (index, None) else f"it is block {block}, in the place of block {index}"


def _short(value: Any) -> str:
    words = json.dumps(value)
    return words if len(words) <= 60 else f"{sha256(words.encode()).hexdigest()[:10]}..."
