"""What a GGUF file says of itself, and what of it can be used here. The file is memory-mapped; nothing in it is run."""

from collections import Counter
from pathlib import Path
from typing import Any

from runners.errors import InputError

# Columns that share a scale, by the type of a tensor; None: the type is no grid.
TYPES: dict[str, int | None] = {
    "F32": None, "F16": None, "BF16": None,
    "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32,
    "Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16,
}  # fmt: skip


class GgufFile:
    """An open GGUF file of one model in one piece, whose tensors are all of TYPES.

    Args:
        path: of the file.

    Attributes:
        architecture: in llama.cpp's words, such as `llama`.
        tensors: the gguf library's tensors, in the file's order.

    Raises:
        InputError: the file is missing, damaged, a piece of several, without tokenizer, or has a tensor of another type.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader  # here: only runs on GGUF files need it

        self.path = path
        if not path.is_file():
            raise InputError(
                f"there is no file {path}: model.path must name a GGUF file or a Hugging Face model folder"
            )
        try:
            reader = GGUFReader(path)
            self._fields = reader.fields
            self.tensors = list(reader.tensors)
            self.architecture = str(self.get("general.architecture"))
        except Exception as error:  # the reader answers damage with whatever numpy raises
            raise InputError(
                f"{path} is no GGUF file, or a damaged one ({_one_line(error)}): download it again"
            ) from error
        self._refuse()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, such as `tokenizer.ggml.pre`; `default` where the file has none."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    @property
    def types(self) -> Counter[str]:
        """How many weights there are of each type; norms and biases, which are vectors, are not counted."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            if len(tensor.shape) > 1:
                counts[tensor.tensor_type.name] += int(tensor.n_elements)
        return counts

    @property
    def note(self) -> str | None:
        """What must be said with every number of the model: its full precision is a grid's; None: it is not."""
        kind = self.types.most_common(1)[0][0]
        if (columns := TYPES[kind]) is None:
            return None
        return (
            f"full precision is dequantized from {kind} (groups of {columns} columns): "
            f"as many bits in such groups lose next to nothing"
        )

    def _refuse(self) -> None:
        if (pieces := int(self.get("split.count", 1))) > 1:
            raise InputError(f"{self.path} is one of {pieces} pieces: join them with llama.cpp's gguf-split --merge")
        if self.get("tokenizer.ggml.tokens") is None:
            raise InputError(f"{self.path} holds no tokenizer (tokenizer.ggml.tokens): take a file that has one")
        if not self.types:
            raise InputError(f"{self.path} holds no weights")
        for tensor in self.tensors:
            if tensor.tensor_type.name not in TYPES:
                raise InputError(
                    f"the tensor {tensor.name} in {self.path} is of type {tensor.tensor_type.name}, not one of "
                    f"{', '.join(TYPES)}: take another file of the model"
                )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
