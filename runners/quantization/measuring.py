"""Measures the inputs of a decoder block's linear layers while the sequences run through the block.

The inputs themselves, (tokens, in), are gone with their batch: what is kept of them are sums over the tokens.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantease.matmul import add_cross_moment, add_second_moment
from runners.errors import InputError
from runners.models.activations import BlockActivations
from runners.models.blocks import linear_layers
from runners.quantization.input_statistics import Hook, InputGroup, InputStatistics, MeasuredGroups, hooked
from runners.quantization.token_energy import TokenEnergy

MOST_TOKENS = 2048  # held-out tokens whose inputs are kept as they are
TOKENS_AT_ONCE = 8192  # of a batch whose inputs are copied to be scaled: with 20,480 inputs 670 MB

Originals = Callable[[int], dict[str, Tensor]]  # batch number to the inputs x (tokens, in) of each layer


def input_statistics(
    activations: BlockActivations,
    index: int,
    groups: list[InputGroup],
    length_one: bool = False,
    originals: Originals | None = None,
) -> MeasuredGroups:
    """Run an open decoder block on all sequences and take the statistics of some groups' inputs.

    Args:
        activations: at the inputs of the block.
        index: of the block.
        groups: from `input_groups`.
        length_one: scale the input of every calibration token to length one before it enters a sum.
        originals: gives the inputs of the same layers in the unquantized model, for the cross moment; it is asked once for
            every batch of calibration sequences, before the batch is sent through the block. None: there is no cross moment.

    Returns:
        The groups that some calibration token has reached, in the order of `groups`, each with its statistics.
    """
    layers = linear_layers(activations.blocks[index])
    measuring = _Measuring(activations, length_one)
    hooks = [(layers[name].module, measuring.hook(name)) for name, *_ in groups]  # the others' input is the same
    batches = activations.run(index)
    for number in range(len(activations.hidden)):
        is_paired = originals is not None and number < activations.calibration_batches
        measuring.pair_with(originals(number) if originals is not None and is_paired else None)
        with hooked(hooks):  # not before: `originals` may run the same modules
            next(batches)
    return [(group, measuring.statistics(group[0])) for group in groups if measuring.has_reached(group[0])]


class _Measuring:
    """What is measured of the inputs of some layers while the sequences run through their block."""

    def __init__(self, activations: BlockActivations, length_one: bool) -> None:
        length = activations.hidden[0].shape[1]
        self._activations = activations
        self._calibration, self._held_out = _Sums(length_one), _Sums()
        self._energies = _Energies(activations.calibration_tokens, length)
        self._tokens = _HeldOutTokens(activations.held_out_tokens, length)
        self._crosses = _Crosses(length, length_one)
        self._originals: dict[str, Tensor] | None = None

    def pair_with(self, originals: dict[str, Tensor] | None) -> None:
        """Take the inputs (tokens, in) of the layers in the unquantized model, for the batch that comes next."""
        if self._originals and any(map(len, self._originals.values())):
            raise InputError(_other_tokens(next(name for name, x in self._originals.items() if len(x))))
        self._originals = originals

    @property
    def _is_calibration(self) -> bool:
        return self._activations.batch_index < self._activations.calibration_batches

    @property
    def sums(self) -> "_Sums":
        """Those of the sequences that are running."""
        return self._calibration if self._is_calibration else self._held_out

    def hook(self, name: str) -> Hook:
        """Of the layer `name`."""

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if not x.numel():  # some experts are called without a token
                return
            self.sums.add(name, x.flatten(0, -2), self._activations.memory.hessian_parts)
            if self._is_calibration:
                self._energies.add(name, x)
                self._add_cross(name, x.flatten(0, -2))
            else:
                self._tokens.add(name, x.flatten(0, -2))

        return hook

    def _add_cross(self, name: str, quantized: Tensor) -> None:
        if self._originals is None:
            return
        original = self._originals.get(name, quantized[:0])
        if len(original) < len(quantized):
            raise InputError(_other_tokens(name))
        # A batch may come in parts, the unquantized one as a whole.
        self._originals[name] = original[len(quantized) :]
        self._crosses.add(name, original[: len(quantized)], quantized, self._activations.memory.hessian_parts)

    def has_reached(self, name: str) -> bool:
        """Whether any calibration token has reached the layer `name`."""
        return self._calibration.has(name)

    def statistics(self, name: str) -> InputStatistics:
        """Of the input of the layer `name`; to be asked for once."""
        tokens = self._calibration.tokens[name]
        cross, cross_half = self._crosses.means(name, tokens)
        return InputStatistics(
            *self._calibration.means(name),
            held_out=self._held_out.means(name)[0] if self._held_out.has(name) else None,
            held_out_tokens=self._tokens.of(name),
            energy=self._energies.of(name),
            tokens=tokens,
            of_tokens=self._activations.calibration_tokens,
            cross=cross,
            cross_half=cross_half,
        )


class _Sums:
    """Sums over the tokens of one kind of sequences, calibration or held out; one sum of each kind per layer.

    Args:
        length_one: every token's input is scaled to length one first.

    Attributes:
        tokens: how many tokens have reached each layer.
    """

    def __init__(self, length_one: bool = False) -> None:
        self.tokens: dict[str, int] = {}
        self._length_one = length_one
        self._hessians: dict[str, Tensor] = {}
        self._magnitudes: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, parts: int) -> None:
        """Add the tokens' inputs x (tokens, in); sums are float32 whatever the model's dtype."""
        if name not in self._hessians:
            self._hessians[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self._magnitudes[name] = torch.zeros(x.shape[1], device=x.device)
        self.tokens[name] = self.tokens.get(name, 0) + len(x)
        # Summed over all tokens and divided once: a running mean would round at every batch.
        scaled = (_at_length_one(some, some) for some in x.split(TOKENS_AT_ONCE))
        for some in scaled if self._length_one else [x]:
            add_second_moment(self._hessians[name], some, parts)
            self._magnitudes[name] += some.abs().sum(0, dtype=torch.float32)

    def has(self, name: str) -> bool:
        """Whether the layer has seen any of these sequences' tokens; an expert may see none."""
        return name in self._hessians

    def means(self, name: str) -> tuple[Tensor, Tensor]:
        """The means of x x^T and of |x|. In place, as a second Hessian may not fit: to be asked for once."""
        tokens = self.tokens[name]
        return self._hessians[name].div_(tokens), self._magnitudes[name].div_(tokens)


def _at_length_one(x: Tensor, of: Tensor) -> Tensor:
    """Inputs x (tokens, in) scaled by what brings those `of` the same tokens to length one. Zeros stay zeros.

    float32: half precision would round them once more.
    """
    x, of = x.float(), of.float()
    largest = of.abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    of = of / largest  # first, as the squares of very small and large inputs are no float32
    lengths = torch.linalg.vector_norm(of, dim=-1, keepdim=True)
    return x / largest / torch.where(lengths > 0, lengths, 1)


class _Crosses:
    """The cross moments sum (x - x^) x^^T of inputs x in the unquantized model and x^ in the quantized one; per layer.

    Args:
        length: of a sequence.
        length_one: both are scaled by what brings x^ to length one.
    """

    def __init__(self, length: int, length_one: bool) -> None:
        self._length, self._length_one = length, length_one
        self._seen: dict[str, int] = {}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # over the sequences of even number, and of odd

    def add(self, name: str, original: Tensor, quantized: Tensor, parts: int) -> None:
        """Add the inputs x and x^ (tokens, in) of the same tokens; sums are float32."""
        if name not in self._sums:
            width = quantized.shape[1]
            zeros = quantized.new_zeros(2, width, width, dtype=torch.float32)
            self._sums[name] = (zeros[0], zeros[1])
        numbers = torch.arange(len(quantized), device=quantized.device) + self._seen.get(name, 0)
        odd = (numbers // self._length) % 2 == 1
        self._seen[name] = self._seen.get(name, 0) + len(quantized)
        # The difference of near numbers is exact in half precision, too, and a sum of differences cancels nothing.
        difference = (original.float() - quantized.float()).to(quantized.dtype)
        for total, which in zip(self._sums[name], (~odd, odd), strict=True):
            pairs = zip(difference[which].split(TOKENS_AT_ONCE), quantized[which].split(TOKENS_AT_ONCE), strict=True)
            for lost, of in pairs:
                if self._length_one:
                    lost, of = _at_length_one(lost, of), _at_length_one(of, of)
                add_cross_moment(total, lost, of, parts)

    def means(self, name: str, tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """The mean of (x - x^) x^^T over so many tokens, and the part of it that the sequences of odd number add.

        None: the layer has no pairs. In place: to be asked for once.
        """
        if name not in self._sums:
            return None, None
        even, odd = self._sums.pop(name)
        odd.div_(tokens)
        return even.div_(tokens).add_(odd), odd


class _Energies:
    """The energy ||x||^2 of every calibration token; per layer.

    Args:
        tokens: of all sequences.
        length: of a sequence.
    """

    def __init__(self, tokens: int, length: int) -> None:
        self._tokens, self._length = tokens, length
        self._batches: dict[str, list[Tensor]] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Add the inputs of some tokens (..., in)."""
        energies = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()
        self._batches.setdefault(name, []).append(energies.flatten())

    def of(self, name: str) -> TokenEnergy:
        """How the energy of a layer's input is divided among its tokens.

        A layer that sees all tokens of all sequences sees them in their order, whatever the shape of its input (OPT joins
        the sequences before its MLP). An expert sees some of them, at positions that are not known here.
        """
        batches = self._batches.get(name, [])
        if sum(map(len, batches)) == self._tokens and all(len(batch) % self._length == 0 for batch in batches):
            batches = [batch.reshape(-1, self._length) for batch in batches]
        return TokenEnergy.of(batches) if batches else TokenEnergy()


def _other_tokens(name: str) -> str:
    return (
        f"the inputs of {name} cannot be paired: it receives other tokens in the quantized model than in the "
        "unquantized one, as experts do. Take a method that needs no cross moment"
    )


class _HeldOutTokens:
    """The inputs of every k-th held-out token, at most MOST_TOKENS of them; per layer.

    k has no divisor in common with the length of a sequence, so that every position of a window is as likely as any other:
    with every 16th token of windows of 2,048, one in 128 would be a first token, which is unlike all others.

    Args:
        count: how many held-out tokens there are.
        length: of a sequence.
    """

    def __init__(self, count: int, length: int) -> None:
        self._every = max(1, math.ceil(count / MOST_TOKENS))
        while math.gcd(self._every, length) != 1:
            self._every += 1
        self._seen: dict[str, int] = {}
        self._kept: dict[str, list[Tensor]] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Keep some of the inputs x (tokens, in)."""
        seen = self._seen.get(name, 0)
        # clone: a view would keep the whole batch alive
        self._kept.setdefault(name, []).append(x[-seen % self._every :: self._every].clone())
        self._seen[name] = seen + len(x)

    def of(self, name: str) -> Tensor | None:
        """The inputs that were kept, (tokens, in); None: the layer has seen no held-out token."""
        kept = self._kept.get(name)
        return torch.cat(kept) if kept else None
