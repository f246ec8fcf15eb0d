"""Which tensor of a checkpoint's files is which weight of the model, by the rules of transformers.

Files may use other names than the modules: old prefixes, names without the base model's prefix, weights that are tied to
another and not stored at all. transformers keeps tables of these, and of modules that keep float32 whatever the model's
dtype. They are used here, so that what is read block by block is what `from_pretrained` would load. The functions that are
called are not part of its public interface: `tests/models/test_loaders.py` holds both loaders to each other.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
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
class WeightNames:
    """What the tensors of the files are to the model.

    Attributes:
        stored: for each weight and buffer that the files hold as it is: its name there.
        missing: weights and buffers that they do not hold as they are; tied ones and converted ones are among them.
        unused: tensors for which the model has no place, by the names that transformers gives them, but for those that it
            ignores on purpose (multi-token prediction, tables that are computed today).
    """

    stored: dict[str, str]
    missing: frozenset[str]
    unused: frozenset[str]

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
    adjusted = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unknown))
    model._adjust_missing_and_unexpected_keys(adjusted)  # removes those that are ignored on purpose
    shapes = shards.shapes()
    # Attention masks, which old files hold under the name of a bias, have four dimensions.
    unused = {
        name for name in adjusted.unexpected_keys if not name.endswith(".bias") or len(shapes[unknown[name]]) == 1
    }
    return WeightNames(stored, frozenset(set(state) - set(stored)), frozenset(unused))


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
    for group in groups.values():
        if not group.isdisjoint(names.stored) and not any(name.startswith(f"{blocks}.") for name in group):
            readable |= group
    return sorted(names.missing - readable)


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
