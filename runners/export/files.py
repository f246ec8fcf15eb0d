"""The files of an export: its safetensors with their index, its config.json, and what lies beside a model's weights."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from runners.models.shards import INDEX
from runners.storage.files import write, write_tensors

# What a folder of a model holds besides its weights: tokenizer, settings of generation, licenses.
BESIDE = (
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "generation_config.json",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
)


@dataclass
class WeightFiles:
    """The safetensors files of an export, in the order in which they are written, and the index over them."""

    folder: Path
    names: list[str] = field(default_factory=list)
    file_of: dict[str, str] = field(default_factory=dict)
    size: int = 0  # of all tensors, in bytes

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write one more file."""
        if not tensors:
            return
        file = f"model-{len(self.names) + 1:05d}.safetensors"
        write_tensors(self.folder / file, tensors, {"format": "pt"})
        self.names.append(file)
        self.file_of |= dict.fromkeys(tensors, file)
        self.size += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        """Write the index."""
        index = {"metadata": {"total_size": self.size}, "weight_map": self.file_of}
        write(self.folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_config(original: Path, folder: Path, dtype: str, entries: dict[str, Any]) -> None:
    """Write config.json: that of the `original` folder, with the dtype of what is written and with more `entries`."""
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    named = {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}
    write(folder / "config.json", json.dumps(config | named | entries, indent=2) + "\n")


def copy_beside(original: Path, folder: Path) -> None:
    """Copy what else the `original` folder holds for its tokenizer and for generation, but for what is there already."""
    for pattern in BESIDE:
        for file in original.glob(pattern):
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
