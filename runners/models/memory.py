"""When memory runs out: hold less at once, record what was reduced, and try again.

Only how the work is divided changes, and with it the order of sums, never what is computed. The steps are recorded with the
result, and a resumed run begins with the same division, so that it ends with the same bits.
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
Remedy = Callable[[], str | None]  # reduces something and returns what, in words; None: it cannot be reduced further

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# Bytes from which on malloc gives an allocation a mapping of its own, which goes back to the system when freed; the most
# that glibc takes. A forward pass frees tensors of some MB and asks for them again all the time: where each time the system
# had to map and zero their pages, that took a fifth of a run on a CPU.
LARGE = 2**25
# Free bytes at the end of the heap from which on malloc returns them by itself. They are returned after every decoder block
# anyway (`trim_malloc`), so this is what one block may leave between its tensors.
KEPT = 2**28
MAX_PARTS = 64  # of a Hessian, and slices of a layer: further ones would free less than 2 % of it
# What PyTorch's allocators say. On the CPU an allocation that fails is a RuntimeError like any other.
OUT_OF_MEMORY_PHRASES = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate",
)


@dataclass
class Memory:
    """How much is held in memory at once, and what was reduced.

    Attributes:
        batch_size: sequences that go through a decoder block together; None: the whole batch that is held.
        offload: whether the activations are in host memory; None: decided by the first batch.
        hessian_parts: in how many parts a batch's contribution is added to a Hessian.
        row_slices: in how many slices of rows a layer is solved, if its rows are independent: then this is exact.
        steps: what was reduced, and when, in words.
    """

    batch_size: int | None = None
    offload: bool | None = None
    hessian_parts: int = 1
    row_slices: int = 1
    steps: list[str] = field(default_factory=list)

    def retry(self, what: str, run: Callable[[], T], *remedies: Remedy) -> T:
        """Call `run`; each time memory runs out, apply the first remedy that still reduces something, and call it again.

        Args:
            what: when this happens, for messages, such as "in the calibration of block 3".
            run: must be repeatable after an error.
            remedies: in the order in which they are to be tried.

        Returns:
            What `run` returns.

        Raises:
            InputError: memory ran out and nothing is left to reduce.
        """
        while True:
            try:
                return run()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames keep alive the tensors that did not fit
                reason = str(error).split("\n")[0][:200]
            # Outside the except clause, where the error and its frames are gone: what they held can be freed now.
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
        """A remedy: halve the number of sequences that go through a decoder block together, `largest` at first."""

        def remedy() -> str | None:
            if (
                size := self.batch_size or largest
            ) == 1:  # a sequence cannot be divided: its tokens attend to each other
                return None
            self.batch_size = size // 2
            return f"batches of {self.batch_size}"

        return remedy

    def smaller_hessian_parts(self) -> str | None:
        """A remedy: add to Hessians in four times as many parts, each a quarter of the memory beside the Hessian."""
        if self.hessian_parts >= MAX_PARTS:
            return None
        self.hessian_parts *= 4  # not 2: each attempt that fails has cost a pass over the data
        return f"Hessians in {self.hessian_parts} parts"

    def thinner_slices(self, rows: int) -> Remedy:
        """A remedy: solve layers, of `rows` rows, in twice as many slices of their rows."""

        def remedy() -> str | None:
            if self.row_slices >= min(MAX_PARTS, rows):  # a slice has at least one row
                return None
            self.row_slices *= 2
            return f"layers in {self.row_slices} slices of rows"

        return remedy

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run must begin with to end with the same bits; goes into JSON."""
        names = ("batch_size", "offload", "hessian_parts", "row_slices", "steps")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the `state` of the interrupted run that this one resumes."""
        for name, value in state.items():
            setattr(self, name, list(value) if name == "steps" else value)


def configure_malloc() -> None:
    """Have glibc return large tensors to the system when they are freed, and keep the memory of small ones for the next.

    By default its thresholds grow with the largest tensor freed, so that ever more of them stay in the heap, in pieces. Once
    one of them is set the other no longer grows, and would be 128 KB: the heap would shrink and grow with every tensor.
    """
    with suppress(AttributeError, OSError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def trim_malloc() -> None:
    """Return freed memory to the system. glibc keeps free pieces between pieces in use, more with every decoder block."""
    with suppress(AttributeError, OSError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on the GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in OUT_OF_MEMORY_PHRASES)
