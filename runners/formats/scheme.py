"""How a checkpoint was quantized, in the words of the tool that did it, and what reads the tensors of one layer."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from runners.formats.parts import Parts


@dataclass(frozen=True)
class Scheme:
    """The grid of a layer as its checkpoint names it.

    Attributes:
        method: that has quantized it, as far as the config tells: the name of the method, else of the format.
        layout: of the tensors, with its version, such as `gptq v1`.
        bits: per code.
        group_size: columns that share a scale; None: all of a row.
        grid: `int`, or the name of a table of levels such as `nf4`.
    """

    method: str
    layout: str
    bits: int
    group_size: int | None
    symmetric: bool
    act_order: bool
    grid: str = "int"


class Layout(Protocol):
    """What one file of this room knows to read."""

    def parts_of(self, names: set[str]) -> dict[str, dict[str, str]]:
        """By the name of each quantized layer its tensors: the names of them, by their parts."""
        ...

    def open(self, parts: Parts) -> "PackedLayer":
        """A layer, checked in what can be seen without its codes.

        Raises:
            InputError: naming the tensor that is missing, or has another shape or type than its layout says.
        """
        ...


class PackedLayer(Protocol):
    """One quantized layer in a file.

    Attributes:
        parts: its tensors.
        scheme: its grid.
        shape: of its weight (out, in).
    """

    @property
    def parts(self) -> Parts: ...

    @property
    def scheme(self) -> Scheme: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def weight(self) -> Tensor:
        """The weight (out, in), float32, not yet rounded to the model's dtype.

        Raises:
            InputError: naming the tensor whose numbers cannot be.
        """
        ...


def modules_with(names: set[str], anchor: str, parts: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The modules that have a tensor `anchor`: for each its tensors among `anchor` and `parts`, by their last part."""
    ending = f".{anchor}"
    modules = sorted(name.removesuffix(ending) for name in names if name.endswith(ending))
    return {
        module: {part: full for part in (anchor, *parts) if (full := f"{module}.{part}") in names} for module in modules
    }
