"""Which tensor of a checkpoint's files is which weight of the model, by the rules of transformers.

Files may use other names than the modules: old prefixes, names without the base model's prefix, weights that are tied to
another and not stored at all. transformers keeps tables of these, and of modules that keep float32 whatever the model's
dtype. They are used here, so that what is read block by block is what `from_pretrained` would load. The functions that are
called are not part of its public interface: `tests/models/test_loaders.py` holds both loaders to each other.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from runners.models.shards import Shards


@dataclass(frozen=True)
class Conversion:
    """Weights that transformers makes of other tensors of the files, such as fused experts of the tensors of each expert.

    Attributes:
        converter: transformers' own.
        name: the weight that it makes, of several the first.
        sources: the tensors of the files that it takes, in its order, each with the pattern that it has matched.
        makes: the shape of each weight that it makes, by name.
    """

    converter: WeightConverter
    name: str
    sources: tuple[tuple[str, str], ...]
    makes: Mapping[str, tuple[int, ...]]

    def convert(self, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights by name, of the sources by theirs."""
        return _converted(self.converter, self.name, self.sources, model, tensors)


@dataclass(frozen=True)
class WeightNames:
    """What the tensors of the files are to the model.

    Attributes:
        stored: for each weight and buffer that the files hold as it is: its name there.
        conversions: how others are made of what they hold.
        missing: weights and buffers that are neither; tied ones are among them.
        unused: tensors for which the model has no place, by the names that transformers gives them, but for those that it
            ignores on purpose (multi-token prediction, tables that are computed today).
    """

    stored: dict[str, str]
    missing: frozenset[str]
    unused: frozenset[str]
    conversions: tuple[Conversion, ...] = ()

    @property
    def made(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight that a conversion makes."""
        return {name: shape for conversion in self.conversions for name, shape in conversion.makes.items()}

    def outside(self, prefix: str) -> list[str]:
        """The stored weights and buffers whose names do not begin with `prefix`."""
        return [name for name in self.stored if not name.startswith(prefix)]


def match_names(model: Any, shards: Shards) -> WeightNames:
    """Find out which tensor of the files is which weight of the model; its weights may be on the meta device."""
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    stored: dict[str, str] = {}
    sources: dict[str, list[tuple[str, str]]] = {}  # of conversions, by the first weight that each makes
    unknown: dict[str, str] = {}
    # In transformers' order, on which some renamings depend; of two tensors of one name it takes the first.
    for tensor in sorted(shards.file_of, key=dot_natural_key):
        name, converted = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if name not in state and tensor in state:
            name, converted = rename_source_key(tensor, [], [], model.base_model_prefix, state)
        if name not in state:
            unknown[name] = tensor
        elif converted is None:  # a converted weight is made of several tensors, or of a part of one
            stored.setdefault(name, tensor)
        else:
            sources.setdefault(name, []).append((tensor, converted))
    adjusted = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unknown))
    model._adjust_missing_and_unexpected_keys(adjusted)  # removes those that are ignored on purpose
    shapes = shards.shapes()
    # Attention masks, which old files hold under the name of a bias, have four dimensions.
    unused = {
        name for name in adjusted.unexpected_keys if not name.endswith(".bias") or len(shapes[unknown[name]]) == 1
    }
    conversions = tuple(_conversions(model, converters, sources, shapes, state.keys() - stored.keys()))
    made = {name for conversion in conversions for name in conversion.makes}
    return WeightNames(stored, frozenset(state.keys() - stored.keys() - made), frozenset(unused), conversions)


def _conversions(
    model: Any,
    converters: list[WeightConverter],
    sources: dict[str, list[tuple[str, str]]],
    shapes: dict[str, tuple[int, ...]],
    wanted: Set[str],
) -> Iterator[Conversion]:
    """The conversions that work on tensors of these shapes and make nothing but weights that are wanted."""
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for name, members in sources.items():
        converter = by_pattern[members[0][1]]
        try:
            on_meta = {tensor: torch.empty(shapes[tensor], device="meta") for tensor, _ in members}
            made = _converted(converter, name, members, model, on_meta)
        except Exception:  # of any kind: then transformers has to say what is wrong, when it loads the whole model
            continue
        if made.keys() <= wanted:
            yield Conversion(
                converter, name, tuple(members), {key: tuple(weight.shape) for key, weight in made.items()}
            )


def _converted(
    converter: WeightConverter,
    name: str,
    sources: Iterable[tuple[str, str]],
    model: Any,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    mine = copy.deepcopy(converter)  # it collects the tensors
    for tensor, pattern in sources:
        mine.add_tensor(name, tensor, pattern, cast(Any, tensors[tensor]))
    made = mine.convert(name, model=model, config=model.config)
    return {key: weight[0] if isinstance(weight, list) else weight for key, weight in made.items()}


def unmatched_weights(model: Any, names: WeightNames, blocks: str) -> list[str]:
    """Weights that cannot be read one by one, because only transformers knows how to make them.

    Args:
        model: any causal language model; its weights may be on the meta device.
        names: of its weights in the files.
        blocks: the name of its decoder blocks. A weight inside that is tied to another cannot be read with its block alone.
    """
    groups: dict[str, set[str]] = {}
    for name, original in model.all_tied_weights_keys.items():
        groups.setdefault(original, {original}).add(name)
    readable: set[str] = set()
    known = names.stored.keys() | names.made
    for group in groups.values():
        if not group.isdisjoint(known) and not any(name.startswith(f"{blocks}.") for name in group):
            readable |= group
    scattered = {name for made in names.conversions if len(_places(made.makes, blocks)) > 1 for name in made.makes}
    return sorted(names.missing - readable | scattered)


def _places(names: Iterable[str], blocks: str) -> set[str]:
    """The decoder blocks that weights are in; "": outside."""
    return {name.removeprefix(f"{blocks}.").split(".")[0] if name.startswith(f"{blocks}.") else "" for name in names}


def weight_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What each weight and buffer is loaded as when the model is loaded as `dtype`: modules may keep float32.

    Args:
        model: built as `dtype`, so that parameters whose class has chosen a dtype of their own have it.
        dtype: of the model.
    """
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if plan := model._get_dtype_plan(dtype):
        pattern, keys, _ = build_glob_alternation(list(plan))
        for name in dtypes:
            if (match := pattern.search(name)) is not None and match.lastgroup is not None:
                dtypes[name] = plan[keys[match.lastgroup]]
    return dtypes
