"""Fused experts taken apart: what transformers keeps in one tensor for all experts becomes linear layers of each expert.

transformers stores the experts of a block in one module with `gate_up_proj` (experts, gate and up, in) and `down_proj`
(experts, out, width), and multiplies by slices of them. Here every slice is a linear layer under a name of its own, such as
`mlp.experts.3.gate_proj`: a view, so the tensors and their names stay what they are for whoever reads or writes weights. The
module gets another forward pass, with the arithmetic of transformers' `eager` one, which hands the input of each expert
through a module where hooks see it. It holds for all modules that follow transformers' contract for experts
(`transformers.integrations.moe.use_experts_implementation`), whatever their family; `check_walk` compares the two.

The eager arithmetic is the same in every process and on every device, as an index is added to once per expert, in the order
of the experts; transformers chooses among faster ones by version and device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CONTRACT = (
    "has_gate",
    "has_bias",
    "is_transposed",
    "is_concatenated",
)  # what transformers' decorator leaves in a module
INPUTS = "expert_inputs"  # the module that is added to fused experts


class ExpertInput(nn.Module):
    """The input of an expert's layers passes through it, for hooks to see."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class ExpertInputs(nn.Module):
    """The places where the inputs of fused experts can be seen.

    Attributes:
        first: of each expert's gate and up projections, which share an input.
        down: of each expert's down projection.
        is_bypassed: for the time being the experts run transformers' own forward pass, where nothing can be seen.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.first = nn.ModuleList(ExpertInput() for _ in range(experts))
        self.down = nn.ModuleList(ExpertInput() for _ in range(experts))
        self.is_bypassed = False


@dataclass(frozen=True)
class ExpertWeight:
    """The weight of one linear layer of one expert: a part of a fused tensor.

    Attributes:
        owner: the module of all experts.
        name: of the tensor in it, whose first dimension is that of the experts.
        expert: index of the expert.
        rows: which output features of the tensor are the layer's.
    """

    owner: Any
    name: str
    expert: int
    rows: slice

    @property
    def parameter(self) -> Tensor:
        """The fused tensor."""
        return getattr(self.owner, self.name)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), a view."""
        of_expert = self.parameter.detach()[self.expert]
        return (of_expert.T if self.owner.is_transposed else of_expert)[self.rows]


def take_apart(model: nn.Module) -> None:
    """Make linear layers of the fused experts of a model; what has been taken apart already stays so.

    Experts that do not follow the contract stay one matrix that no method is given.
    """
    module: Any
    for module in list(model.modules()):
        if _follows_contract(module) and not is_taken_apart(module):
            setattr(module, INPUTS, ExpertInputs(len(module.down_proj)))
            module.config._experts_implementation = "eager"  # of transformers' own forward pass
            module.forward = partial(_forward, module)  # hides the class's method


def is_taken_apart(module: nn.Module) -> bool:
    """Whether a module holds fused experts that are linear layers, too."""
    return INPUTS in module._modules


def expert_weights(module: Any) -> Iterator[tuple[str, nn.Module, ExpertWeight]]:
    """The linear layers of fused experts: name inside the module, the module that sees the input, and the weight.

    First those of all experts that share the block's input, then the down projections.
    """
    inputs: ExpertInputs = getattr(module, INPUTS)
    count, whole = len(inputs.down), slice(None)
    for expert in range(count):
        if module.has_gate:
            gate, up = _halves(module)
            yield f"{expert}.gate_proj", inputs.first[expert], ExpertWeight(module, "gate_up_proj", expert, gate)
            yield f"{expert}.up_proj", inputs.first[expert], ExpertWeight(module, "gate_up_proj", expert, up)
        else:
            yield f"{expert}.up_proj", inputs.first[expert], ExpertWeight(module, "up_proj", expert, whole)
    for expert in range(count):
        yield f"{expert}.down_proj", inputs.down[expert], ExpertWeight(module, "down_proj", expert, whole)


@contextmanager
def own_experts(model: nn.Module, own: bool = True) -> Iterator[None]:
    """For the time of the context, run transformers' own forward pass of experts (`own`), or that of experts taken apart."""
    inputs = [module for module in model.modules() if isinstance(module, ExpertInputs)]
    before = [module.is_bypassed for module in inputs]
    for module in inputs:
        module.is_bypassed = own
    try:
        yield
    finally:
        for module, was in zip(inputs, before, strict=True):
            module.is_bypassed = was


def routers(block: nn.Module) -> set[str]:
    """The names of the matrices in a block that decide which experts a token goes to, or how much of one it takes.

    They are found beside the experts: in a module that is called a router, or in one with a single matrix, which has as many
    outputs as there are experts, or one output (the gate of a shared expert).
    """
    found: set[str] = set()
    for prefix, module in block.named_modules():
        counts = {count for child in module.children() if (count := _experts_in(child))}
        for name, child in module.named_children() if counts else ():
            matrices = {key: len(p) for key, p in child.named_parameters(name) if p.ndim == 2}
            is_single = len(matrices) == 1 and set(matrices.values()) <= counts | {1}
            if type(child).__name__.endswith("Router") or is_single:
                found |= {f"{prefix}.{key}" if prefix else key for key in matrices}
    return found


def _experts_in(module: nn.Module) -> int:
    """How many experts a module holds in fused tensors; 0: it holds none."""
    fused = [len(parameter) for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    return fused[0] if len(fused) > 1 and len(set(fused)) == 1 else 0


def _follows_contract(module: Any) -> bool:
    return all(hasattr(module, name) for name in CONTRACT) and _experts_in(module) > 0


def _halves(module: Any) -> tuple[slice, slice]:
    """The output features of `gate_up_proj` that belong to the gate, and those that belong to the up projection."""
    if not module.is_concatenated:
        return slice(0, None, 2), slice(1, None, 2)
    half = module.gate_up_proj.shape[2 if module.is_transposed else 1] // 2
    return slice(0, half), slice(half, None)


def _forward(module: Any, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The experts' output (tokens, width).

    Args:
        module: of the experts.
        hidden_states: (tokens, width).
        indices: which experts each token is routed to, (tokens, k).
        weights: with which weight, (tokens, k).
    """
    inputs: ExpertInputs = getattr(module, INPUTS)
    if inputs.is_bypassed:
        return type(module).forward(module, hidden_states, indices, weights)
    # Experts without a gate (Nemotron-H) are added in the dtype of the routing weights, all others in that of the model.
    output = torch.zeros_like(hidden_states, dtype=None if module.has_gate else weights.dtype)
    for expert in indices.unique().tolist():
        if expert >= len(inputs.down):  # stands for no expert
            continue
        place, token = torch.where(indices.T.eq(expert))
        x = inputs.first[expert](hidden_states[token])
        x = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", expert, x)
        x = inputs.down[expert](module._apply_gate(x) if module.has_gate else module.act_fn(x))
        x = _linear(module, "down_proj", expert, x)
        if getattr(module, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        x = x * weights[token, place, None]
        output.index_add_(0, token, x.to(output.dtype))
    return output.to(hidden_states.dtype)


def _linear(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    """The product with one expert's slice of a fused tensor. Gate and up in one, as transformers has it: bit for bit."""
    weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    if not module.is_transposed:
        return functional.linear(x, weight, bias)
    return x @ weight if bias is None else x @ weight + bias
