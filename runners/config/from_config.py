"""Checked settings from a configuration that Hydra has composed."""

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from quantease.layer import LayerSolver
from runners.config.build import build, unknown_setting
from runners.config.execution import Execution
from runners.config.hydra_internals import option_of_group, options_of_group
from runners.config.run import Method, Run
from runners.config.settings import ALL_SETTINGS, RUN_SETTINGS, Settings
from runners.errors import InputError, known_names

NAMES_A_METHOD = (
    "init",
    "solver",
)  # settings of a method that are another method: given by its name, they are its file
OWN_TEXT = "file"  # the key of the text in conf/evaluation/file.yaml


def settings_from(cfg: DictConfig) -> Settings:
    """The settings of one cell.

    Raises:
        InputError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    tree = _resolved(cfg)
    for key in tree:
        if key not in ALL_SETTINGS:
            raise unknown_setting("", key, list(ALL_SETTINGS))
    tree["method"] = _method(tree.get("method"))
    if "transform" in tree:
        tree["transform"] = _transform(tree["transform"])
    tree |= {key: _without_shorthands(key, tree[key]) for key in ("calibration", "evaluation") if key in tree}
    if "calibration" in tree:
        tree["calibration"] = _calibration(tree["calibration"])
    run = {key: entry for key, entry in tree.items() if key in RUN_SETTINGS}
    execution = {key: entry for key, entry in tree.items() if key not in RUN_SETTINGS}
    return Settings(build(Run, run, ""), build(Execution, execution, ""))


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration without Hydra's part, with every interpolation replaced by its value."""
    # Hydra's part names its folder by the run's name, which is computed from what is built here.
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        return cast(dict[str, Any], OmegaConf.to_container(ours, resolve=True))
    except InterpolationToMissingValueError as error:
        missing = str(error).splitlines()[0].rpartition(" ")[2]
        raise InputError(f"{missing} is missing: set {missing}=...") from None
    except OmegaConfBaseException as error:
        raise InputError(str(error).splitlines()[0]) from None


def _method(node: Any) -> Method:
    """A method's file: its name, and the solver whose settings are the other keys."""
    method = dict(node or {})
    name, target = method.pop("name", None), method.get("_target_")
    if not isinstance(name, str):
        raise InputError("method.name is missing: the file of a method in conf/ must give its name")
    if target is None and (unknown := sorted(set(method) - {"_target_"})):
        raise unknown_setting("method", unknown[0], [])
    solver = _with_named_methods(method, "method")
    return Method(name, build(LayerSolver, solver, "method") if target is not None else None)


def _transform(node: Any) -> Any:
    """A transform's file, whose class knows its name; None for the one that leaves layers as they are."""
    if not isinstance(node, dict):
        return node
    settings = {key: entry for key, entry in node.items() if key != "name"}
    if settings.get("_target_") is None:
        if settings:
            raise unknown_setting("transform", next(iter(settings)), [])
        return None
    return settings


def _calibration(node: Any) -> Any:
    """A calibration's file; None for the one without a data set, which has no settings."""
    if not isinstance(node, dict) or node.get("dataset", node) is not None:
        return node
    if unknown := sorted(set(node) - {"name", "dataset"}):
        raise unknown_setting("calibration", unknown[0], [])
    return None


def _without_shorthands(group: str, node: Any) -> Any:
    """The node of a text of one's own (conf/*/file.yaml) without `path` and `column`, which its data set has taken over.

    Of an evaluation, `name` becomes the name of the text.
    """
    if not isinstance(node, dict) or "path" not in node:
        return node
    node = {key: entry for key, entry in node.items() if key not in ("path", "column")}
    if group == "evaluation" and isinstance(name := node.pop("name", None), str):
        node["texts"] = {name if text == OWN_TEXT else text: entry for text, entry in node["texts"].items()}
    return node


def _with_named_methods(node: dict[str, Any], where: str, named: tuple[str, ...] = ()) -> dict[str, Any]:
    """A method's settings, in which methods that are given by name, as `init=gptq`, are the settings of their files.

    Args:
        where: the node's key, for messages.
        named: the methods inside of which it is, none of which it may name again.
    """
    node = dict(node)
    for key in NAMES_A_METHOD:
        name, place = node.get(key), f"{where}.{key}"
        if isinstance(name, str):
            if name in named:
                raise InputError(f"{place}={name}: {name} is made of itself")
            node[key] = _with_named_methods(_method_named(name, place), place, (*named, name))
        elif isinstance(name, dict):
            node[key] = _with_named_methods(name, place, named)
    return node


def _method_named(name: str, where: str) -> dict[str, Any]:
    """The settings of another method's file, for `method.init=gptq`, where `where` is `method.init`."""
    options = options_of_group("method")
    if name not in options:
        raise InputError(f"there is no method {name} for {where}: {known_names(name, options)}")
    node = option_of_group("method", name)
    if node.get("_target_") is None:
        missing = "it has no answer to start from: use null" if where.endswith(".init") else "there is nothing to wrap"
        raise InputError(f"{where}={name}: {name} does not quantize, so {missing}")
    return node
