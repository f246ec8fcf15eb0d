"""Which tensor of a checkpoint's files is which weight of the model, by the rules of transformers.

Files may use other names than the modules: old prefixes, names without the base model's prefix, weights that are tied to
another and not stored at all. transformers keeps tables of these. They are used here, so that what is read block by block
is what `from_pretrained` would load.
"""

import re
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from runners.models.shards import Shards


def stored_names(model: Any, shards: Shards) -> dict[str, str]:
    """For each weight of the model that the files hold as it is: its name there."""
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found: dict[str, str] = {}
    for stored in shards.file_of:
        name, converted = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if converted is None and name in state:  # a converted weight is made of several tensors, or of a part of one
            found[name] = stored
    return found


def tied_weights(model: Any, stored: dict[str, str]) -> set[str]:
    """Weights that are the same tensor as another one, by config.json: they need not be stored, and are not read."""
    if not model.config.get_text_config().tie_word_embeddings:
        return set()
    tied = model._tied_weights_keys or {}  # name to original; in older architectures a list of names
    return {name for name, original in tied.items() if original in stored} if isinstance(tied, dict) else set(tied)


def unused_tensors(skeleton: Any, shards: Shards, stored: dict[str, str]) -> set[str]:
    """Tensors of the files for which the model has no place, except those that transformers ignores on purpose."""
    ignored = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()]
    unused = set(shards.file_of) - set(stored.values())
    return {name for name in unused if not any(pattern.search(name) for pattern in ignored)}


def unmatched_weights(skeleton: Any, stored: dict[str, str]) -> list[str]:
    """Weights of the model that the files do not hold as they are: only transformers knows how to make them."""
    tied = tied_weights(skeleton, stored)
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    return [name for name in parameters if name not in stored and name not in tied]
