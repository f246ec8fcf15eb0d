"""The functions that conf/ may call.

`${project:}`, `${basename:PATH}`, `${run_name:}`, `${gpus:}`, `${results_folder:}`, `${choices:GROUP}`, `${fetched:MODEL}`.
"""

import re
import textwrap
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from runners.config.from_config import settings_from
from runners.config.hydra_internals import options_of_group
from runners.fetch.packages import place_of
from runners.project import ROOT, results_folder


def _run_name(*, _root_: DictConfig) -> str:
    return settings_from(_root_).run_name


def _choices(group: str) -> str:
    """The options of a conf group in lines that fit the help page; models are sorted by family and size."""
    names = sorted(options_of_group(group), key=_family_and_size)
    return textwrap.fill(", ".join(names), width=90, break_on_hyphens=False).replace("\n", "\n" + 14 * " ")


def _family_and_size(name: str) -> tuple[str, float]:
    """The key that sorts models: `bloom-1b1` is ("bloom", 1.1e9), so that 560m comes before 1b1."""
    found = re.fullmatch(r"(.+)-(\d+)(?:\.(\d+))?([mb])(\d*)", name)
    if not found:
        return name, 0.0
    family, whole, fraction, unit, rest = found.groups()
    return family, float(f"{whole}.{fraction or rest or 0}") * {"m": 1e6, "b": 1e9}[unit]


OmegaConf.register_new_resolver("choices", _choices, replace=True)
OmegaConf.register_new_resolver("fetched", lambda model: str(place_of(model)), replace=True)
OmegaConf.register_new_resolver("project", lambda: str(ROOT), replace=True)
OmegaConf.register_new_resolver("basename", lambda path: Path(str(path)).expanduser().absolute().name, replace=True)
OmegaConf.register_new_resolver("gpus", torch.cuda.device_count, replace=True)
OmegaConf.register_new_resolver("results_folder", lambda: str(results_folder()), replace=True)
OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
