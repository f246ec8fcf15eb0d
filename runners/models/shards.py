"""The tensors of a checkpoint in its safetensors files: where each one is, and how to read it alone."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from runners.errors import InputError
from runners.formats.scheme import PackedLayer

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # as save_pretrained names them


@dataclass(frozen=True)
class Shards:
    """The tensors of a checkpoint.

    Attributes:
        file_of: name of each tensor to the file that holds it.
        packed: quantized layers by the names of their weights, which are read as if they were stored.
    """

    file_of: dict[str, Path]
    packed: Mapping[str, PackedLayer] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """Each file once."""
        return list(dict.fromkeys(self.file_of.values()))

    @classmethod
    def of(cls, folder: Path) -> "Shards":
        """The tensors of `model.safetensors`, or of the files that its index names.

        Raises:
            InputError: the index names a tensor that its file does not hold.
        """
        whole, index = folder / WHOLE, folder / INDEX
        if whole.is_file():
            return cls(dict.fromkeys(_names(whole), whole))
        mapped: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        held = {file: set(_names(folder / file)) for file in set(mapped.values())}
        for name, file in mapped.items():
            if name not in held[file]:
                raise InputError(f"{folder / file} does not hold the weight {name} that {index.name} places there")
        return cls({name: folder / file for name, file in mapped.items()})

    def unpacked(self, packed: Mapping[str, PackedLayer]) -> "Shards":
        """These tensors, with the weights of quantized layers in the place of what is stored for them."""
        stored = {f"{layer.parts.layer}.{part}" for layer in packed.values() for part in layer.parts.headers}
        plain = {name: file for name, file in self.file_of.items() if name not in stored}
        return Shards(plain | {name: _file_of(layer) for name, layer in packed.items()}, packed)

    def read(self, dtypes: Mapping[str, torch.dtype | None], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Read tensors, file by file, with one file open at a time.

        Args:
            dtypes: name of each tensor to what it is converted to; None: it stays what it is.
            device: where they are put.

        Yields:
            Name and tensor, in the order of the files. A copy: a view of the mapped file would keep all of it in memory.
        """
        by_file: dict[Path, list[str]] = {}
        for name in dtypes:
            by_file.setdefault(self.file_of[name], []).append(name)
        for file, members in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in members:
                    layer = self.packed.get(name)
                    tensor = opened.get_tensor(name) if layer is None else layer.weight()
                    yield name, tensor.to(device=device, dtype=dtypes[name] or tensor.dtype, copy=layer is None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the files' headers."""
        found: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        return found | {name: layer.shape for name, layer in self.packed.items()}

    def first_dtype(self) -> torch.dtype:
        """The type of the first floating-point tensor of the first file, as transformers asks; float32 where none is."""
        for file in sorted(self.files):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dictionary
                    if (tensor := opened.get_tensor(name)).is_floating_point():
                        return tensor.dtype
        return torch.float32

    def state(self) -> tuple[object, ...]:
        """Which files these are, and when they were last written: equal as long as nobody has changed them."""
        files = [(file, file.stat()) for file in self.files]
        return tuple((file, status.st_size, status.st_mtime_ns) for file, status in files)

    def check_finite(self) -> None:
        """Look at every weight once, a tensor at a time.

        Raises:
            InputError: naming the first one that contains NaN or infinity.
        """
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dictionary
                    tensor = opened.get_tensor(name)
                    # The extremes are NaN where any number is: one pass, and no mask as large as the tensor.
                    if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
                        raise InputError(f"the weight {name} in {file} contains NaN or infinity: the file is damaged")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights; they need not exist. Empty where there are none.

    Args:
        folder: of the checkpoint.

    Raises:
        InputError: the index is damaged, or names anything but safetensors files of its own folder.
    """
    index = folder / INDEX
    if (folder / WHOLE).is_file():  # transformers, too, reads the index only where there is no such file
        return [folder / WHOLE]
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index} is damaged: it does not map weights to files") from error
    # A name with a separator could point at any file of this machine, which the run's fingerprint does not cover.
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise InputError(f"{index} names a file outside its folder: {outside[0]}")
    if others := sorted(name for name in names if not name.endswith(".safetensors")):
        raise InputError(f"{index} names {others[0]}, which is not a safetensors file")
    return [index.parent / name for name in sorted(names)]


def _file_of(layer: PackedLayer) -> Path:
    return next(iter(layer.parts.headers.values())).file


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
