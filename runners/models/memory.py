"""What a run does when memory runs out: it makes one thing smaller, says so, and tries again.

Nothing here changes what is computed, but for the order of sums. The steps are recorded with the result.
"""

import ctypes
import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from runners.errors import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")
Remedy = Callable[[], str | None]  # makes something smaller and says what; None: it is as small as it gets

M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 2**22  # bytes
MOST_PARTS = 64  # of a Hessian, and slices of a layer: smaller ones would not free anything that counts
WORDS = ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate")


@dataclass
class Memory:
    """How much is held at once.

    Attributes:
        batch_size: sequences that go through a block together; None: as many as come together.
        offload: keep the activations in host memory; None: only where they would crowd the GPU.
        hessian_parts: in how many parts the products of a Hessian are added to it.
        row_slices: in how many slices of rows a layer is solved. Rows are independent, so this is exact.
        steps: what was made smaller, in words.
    """

    batch_size: int | None = None
    offload: bool | None = None
    hessian_parts: int = 1
    row_slices: int = 1
    steps: list[str] = field(default_factory=list)

    def retry(self, what: str, run: Callable[[], T], *remedies: Remedy) -> T:
        """Run it, as often as memory runs out and a remedy, the first that is left, makes something smaller.

        Raises:
            InputError: memory runs out and nothing is left to make smaller.
        """
        while True:
            try:
                return run()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames hold what did not fit
                reason = str(error).split("\n")[0][:200]
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            step = next((step for remedy in remedies if (step := remedy())), None)
            if step is None:
                raise InputError(
                    f"memory ran out {what}, and nothing is left to make smaller ({reason}): take a machine or GPU with "
                    "more memory, or lower model.sequence_length or calibration.num_sequences"
                )
            log.warning("memory ran out %s: going on with %s", what, step)
            self.steps.append(f"{what}: {step}")

    def smaller_batches(self, largest: int) -> Remedy:
        """Halve the sequences that go through a block together, of `largest` at first."""

        def remedy() -> str | None:
            if (size := self.batch_size or largest) == 1:
                return None
            self.batch_size = size // 2
            return f"batches of {self.batch_size}"

        return remedy

    def smaller_hessian_parts(self) -> str | None:
        """Add a Hessian's products in four times as many parts."""
        if self.hessian_parts >= MOST_PARTS:
            return None
        self.hessian_parts *= 4
        return f"Hessians in {self.hessian_parts} parts"

    def thinner_slices(self, rows: int) -> Remedy:
        """Solve layers in twice as many slices of their rows."""

        def remedy() -> str | None:
            if self.row_slices >= min(MOST_PARTS, rows):
                return None
            self.row_slices *= 2
            return f"layers in {self.row_slices} slices of rows"

        return remedy

    @property
    def state(self) -> dict[str, Any]:
        """What must be the same for a run that goes on to end with the same bits."""
        names = ("batch_size", "offload", "hessian_parts", "row_slices", "steps")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the state of the run that this one goes on with."""
        for name, value in state.items():
            setattr(self, name, list(value) if name == "steps" else value)


def configure_malloc() -> None:
    """Have glibc return large tensors to the system as they are freed: it would keep ever more of them, in pieces."""
    with suppress(AttributeError, OSError):  # another libc
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def trim_malloc() -> None:
    """Return freed memory to the system. glibc keeps what lies between blocks in use, a little more with every block."""
    with suppress(AttributeError, OSError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def out_of_memory(error: Exception) -> bool:
    """Whether that is what went wrong, on the GPU or on the CPU (where it is a RuntimeError like any other)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)
