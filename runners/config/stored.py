"""What the `config.yaml` in a run's folder says, read back: the model and the texts of a run that has ended."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf

from runners.config.build import build
from runners.config.command_line import configuration
from runners.config.hydra_internals import option_of_group, options_of_group
from runners.data.datasets import Dataset
from runners.data.windows import Evaluation, Text
from runners.errors import InputError
from runners.models.checkpoint import Model

TARGETS = {cls.__name__: f"{cls.__module__}.{cls.__name__}" for cls in (Model, Evaluation, Text, *get_args(Dataset))}
FINGERPRINT = re.compile("[0-9a-f]{16}")  # stands for the path of a model in a folder


@dataclass(frozen=True)
class StoredSettings:
    """The settings of a run that measuring its model again needs.

    Attributes:
        model: its path is the fingerprint of its files, unless it is a name on the hub; see `located`.
        data_root: where the run had its data sets.
    """

    model: Model
    evaluation: Evaluation
    data_root: str | None


def stored_settings(folder: Path) -> StoredSettings:
    """The settings of the run in a folder.

    Raises:
        InputError: its config.yaml is missing or damaged, or of a version with other settings.
    """
    file = folder / "config.yaml"
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        nodes = {name: _with_targets(tree[name]) for name in ("model", "evaluation", "data_root")}
    except Exception as error:  # no file, no YAML, or not the settings of a run
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{file} cannot be read ({reason}): make this run again with force=true") from error
    return StoredSettings(
        build(Model, nodes["model"], "model"),
        build(Evaluation, nodes["evaluation"], "evaluation"),
        build(str | None, nodes["data_root"], "data_root"),
    )


def located(model: Model, place: str | None) -> Model:
    """A run's model with the path of its files.

    Args:
        place: a folder, GGUF file or name on the hub; None: where conf/model/ has the model of this name.

    Raises:
        InputError: `place` is needed.
    """
    if place is not None:
        return dataclasses.replace(model, path=place, revision=None)
    if not FINGERPRINT.fullmatch(model.path):
        return model
    with configuration():
        if model.name != "local" and model.name in options_of_group("model"):
            return dataclasses.replace(model, path=str(option_of_group("model", model.name)["path"]))
    raise InputError(f"the run knows its model {model.name} by its content, not by its place: add model=FOLDER")


def _with_targets(node: Any) -> Any:
    """The node with `_target_` for the names of classes, all the way down, as `build` has it."""
    if isinstance(node, list):
        return [_with_targets(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    fields = {key: _with_targets(entry) for key, entry in node.items() if key != "class"}
    return fields | ({"_target_": TARGETS[node["class"]]} if "class" in node else {})
