"""Does a layer's damage come from one token? Its output at the first position of the window, looked at alone.

Heads of language models attend to the first token of the window when there is nothing to attend to (Xiao et al., 2024,
attention sinks): its value vector is almost zero, so that this adds nothing. A solver that minimizes tr(D H D^T) does not
see that token, which is one of thousands and has a small output: an error that is many times its output costs next to
nothing there. But every token attends to it. This command quantizes one layer of the unquantized model with several methods
and compares

    kl                  between the model with that layer quantized and the unquantized one
    kl_first_restored   the same, with the layer's output at position 0 alone as it was in full precision

python -m runners.audit.first_token smollm2-135m blocks=14,18 layer=self_attn.v_proj bits=3 group_size=64 to=FILE
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from quantease.layer import LayerProblem
from quantease.matmul import add_second_moment
from runners.arguments import start
from runners.config.command_line import check
from runners.config.settings import Settings
from runners.console import console
from runners.errors import InputError
from runners.evaluation.likelihood import measure_windows
from runners.models.blocks import decoder_blocks, linear_layers
from runners.models.checkpoint import load
from runners.quantization.layer_errors import token_error
from runners.results.run_folder import write_csv
from runners.run.preflight import preflight


def main(
    model: Annotated[str, "an option of conf/model"],
    /,
    layer: Annotated[str, "name of a linear layer inside a decoder block"],
    blocks: Annotated[tuple[int, ...], "the decoder blocks in which it is looked at"],
    to: Annotated[Path, "file to write"],
    methods: Annotated[tuple[str, ...], "options of conf/method"] = ("rtn", "gptq", "quantease"),
    windows: Annotated[int, "of the first evaluation text"] = 2,
    **settings: Annotated[str, "any setting of a run, such as bits=3 or data_root=FOLDER"],
) -> None:
    """Quantize a layer with several methods, and measure what its output at the first position alone does."""
    words = [f"model={model}", "tracker=none", *(f"{name}={value}" for name, value in settings.items())]
    runs = {name: check([*words, f"method={name}"], multirun=False)[0] for name in methods}
    first = runs[methods[0]]
    if first.run.calibration is not None and first.run.calibration.scales_tokens:
        raise InputError("first_token calibrates with token_weights=uniform only")
    if first.run.layers:
        raise InputError("first_token looks at one layer, which gets the run's grid: leave layers out")
    inputs = preflight(first)
    held_out = None if inputs.sequences is None else inputs.sequences.held_out
    if inputs.sequences is None or held_out is None or not inputs.windows:
        raise InputError("first_token needs methods that quantize, held-out sequences, and an evaluation text")
    loaded = load(inputs.checkpoint, first.run.model, inputs.device).float()
    layers = {index: _layer(loaded, index, layer) for index in blocks}
    with torch.no_grad():
        used = _inputs_of(loaded, layers, inputs.sequences.used)
        unseen = _inputs_of(loaded, layers, held_out)
        text = next(iter(inputs.windows.values())).ids[:windows].to(inputs.device)
        look = FirstToken(loaded, text, _logits(loaded, text))
        rows = [
            {"block": index, "layer": layer, "method": name, **look.row(module, used[index], unseen[index], run)}
            for index, module in layers.items()
            for name, run in runs.items()
        ]
    write_csv(to, list(rows[0]), rows)
    console.print(f"written to {to}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class FirstToken:
    """A model in memory, and what it predicts.

    Attributes:
        text: token ids (windows, length).
        expected: the unquantized model's logits of them.
    """

    model: nn.Module
    text: Tensor
    expected: Tensor

    def row(self, module: nn.Linear, used: Tensor, unseen: Tensor, run: Settings) -> dict[str, float | None]:
        """Quantize a layer, and measure its errors at the first position and elsewhere.

        Args:
            used: the layer's inputs for the calibration sequences (sequences, length, in).
            unseen: likewise, for the held-out sequences.
            run: has the method and the grid.
        """
        original = module.weight.detach().clone()
        x = used.flatten(0, 1)
        hessian = add_second_moment(torch.zeros(x.shape[1], x.shape[1], device=x.device), x) / len(x)
        weight = run.run.solver.solve(LayerProblem(original, hessian, mean_input=x.abs().mean(0)), run.run.grid).weight
        found: dict[str, float | None] = {}
        for name, tokens in {"first": unseen[:, 0], "rest": unseen[:, 1:].flatten(0, 1)}.items():
            found[f"output_{name}"] = (tokens @ original.T).square().sum(1).mean().item()
            found[f"error_{name}"] = (tokens @ (weight - original).T).square().sum(1).mean().item()
            found[f"token_error_{name}"] = token_error(original, weight, tokens)
        with _weight(module, weight):
            found["kl"] = self._kl()
            with _first_restored(module, original):
                found["kl_first_restored"] = self._kl()
        return found

    def _kl(self) -> float:
        return measure_windows(_logits(self.model, self.text), self.text, self.expected)["kl"].mean().item()


def _layer(model: nn.Module, index: int, name: str) -> nn.Linear:
    blocks = decoder_blocks(model)
    if not 0 <= index < len(blocks):
        raise InputError(f"there is no decoder block {index}: the model has {len(blocks)}")
    module = getattr(linear_layers(blocks[index]).get(name), "module", None)
    if not isinstance(module, nn.Linear):
        known = ", ".join(linear_layers(blocks[index]))
        raise InputError(f"block {index} has no linear layer {name}: there are {known}")
    return module


def _logits(model: Any, ids: Tensor) -> Tensor:
    return torch.cat([model(window[None], use_cache=False).logits for window in ids])


def _inputs_of(model: Any, layers: dict[int, nn.Linear], sequences: Tensor) -> dict[int, Tensor]:
    """The inputs of some layers for all sequences, (sequences, length, in)."""
    seen: dict[int, list[Tensor]] = {index: [] for index in layers}

    def keep(index: int) -> Callable[..., None]:
        return lambda _module, args: seen[index].append(args[0].reshape(1, sequences.shape[1], -1))

    handles = [module.register_forward_pre_hook(keep(index)) for index, module in layers.items()]
    base = model.base_model  # without the head, whose logits nobody needs
    for sequence in sequences:
        base(sequence[None].to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return {index: torch.cat(batches) for index, batches in seen.items()}


@contextmanager
def _weight(module: nn.Linear, weight: Tensor) -> Iterator[None]:
    original = module.weight.data
    module.weight.data = weight
    try:
        yield
    finally:
        module.weight.data = original


@contextmanager
def _first_restored(module: nn.Linear, original: Tensor) -> Iterator[None]:
    """The layer's output at position 0 is that of its original weight."""

    def restore(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 0] = nn.functional.linear(args[0][:, 0], original, module.bias)
        return output

    handle = module.register_forward_hook(restore)
    try:
        yield
    finally:
        handle.remove()


if __name__ == "__main__":
    start(main)
