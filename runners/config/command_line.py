"""Check every cell of a command line before the first one starts, with the composition that Hydra will use.

Hydra accepts an unknown key behind a plus sign, and answers some mistakes with a traceback; here each gets a sentence.
"""

import copy
import difflib
import re
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runners.config import launchers
from runners.config import resolvers as resolvers  # importing it registers what conf/ interpolates
from runners.config.build import unknown_setting
from runners.config.settings import Settings
from runners.errors import InputError
from runners.project import CONF
from runners.storage.files import check_writable


def check(overrides: Sequence[str], multirun: bool) -> list[Settings]:
    """Compose and check all cells of a command line.

    Raises:
        InputError: the first thing that is wrong, in a sentence.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = {
            str(group): loader.get_group_options(str(group)) for group in loader.list_groups("") if group != "hydra"
        }
        parsed = _parse(overrides)
        hydras = [f"hydra/{group}" for group in loader.list_groups("hydra")]
        _check_choices(parsed, groups | {group: loader.get_group_options(group) for group in hydras})
        if multirun:
            parsed = _parse(_sweeper_params(parsed)) + parsed
            cells = [_parse(cell) for batch in BasicSweeper.split_arguments(parsed, None) for cell in batch]
        else:
            _refuse_sweeps(parsed)
            cells = [parsed]
        composed: dict[
            tuple[str, ...], DictConfig
        ] = {}  # by the choices; composing takes long, setting values does not
        settings = [_check_cell(cell, groups, composed) for cell in cells]
    for folder in {cell.study_folder for cell in settings if not cell.execution.dry_run}:
        check_writable(folder)
    return settings


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise InputError(
            f"{_first_line(error)}: settings are written as name=value, see python run.py --help"
        ) from None


def _check_choices(overrides: list[Override], groups: dict[str, list[str]]) -> None:
    """Every group that is named must have the option that is chosen."""
    for override in overrides:
        options = groups.get(_group(override))
        if options is None or override.is_delete():
            continue
        choices = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(override.value())]
        for choice in choices:
            if choice not in (*options, "null", "None"):
                close = difflib.get_close_matches(choice, options, n=1)
                hint = f"did you mean {close[0]}? There are" if close else "there are"
                raise InputError(f"there is no {override.key_or_group}={choice}: {hint} {', '.join(options)}")
            if override.key_or_group == launchers.GROUP:
                launchers.check_installed(choice)


def _refuse_sweeps(overrides: list[Override]) -> None:
    for override in overrides:
        if override.is_sweep_override():
            raise InputError(f"{override.input_line} names several values: add -m to run them all")


def _sweeper_params(overrides: list[Override]) -> list[str]:
    """What an experiment file sweeps over."""
    plain = [override.input_line for override in overrides if not override.is_sweep_override()]
    params = _compose([line for line in plain if line], with_hydra=True).hydra.sweeper.params or {}
    return [f"{key}={value}" for key, value in params.items()]


def _check_cell(
    overrides: list[Override], groups: dict[str, list[str]], composed: dict[tuple[str, ...], DictConfig]
) -> Settings:
    chosen = tuple(o.input_line for o in overrides if _group(o) in groups and o.input_line)
    if chosen not in composed:
        composed[chosen] = _compose(list(chosen))
    config = copy.deepcopy(composed[chosen])
    for override in overrides:
        name = override.key_or_group
        if _group(override) in groups or re.match(r"hydra[./]", name):
            continue
        if override.is_delete():
            raise InputError(f"~{name}: settings cannot be taken away, only set")
        _check_key(config, name)
        OmegaConf.update(config, name, override.value())
    return Settings.from_config(config)


def _group(override: Override) -> str:
    return override.key_or_group.split("@")[0]


def _check_key(base: DictConfig, name: str) -> None:
    node: Any = base
    for depth, part in enumerate(name.split(".")):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118 - `in` is false for a missing value
            known = [str(key) for key in node] if isinstance(node, DictConfig) else []
            where = ".".join(name.split(".")[:depth])
            raise unknown_setting(where, part, [key for key in known if key != "_target_"])
        node = node._get_node(part)


def _compose(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    try:
        return compose("config", overrides, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:")
