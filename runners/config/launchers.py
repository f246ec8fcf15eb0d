"""Hydra's launchers, which run the cells of a sweep on several processes or machines: `hydra/launcher=...`."""

import importlib.util
import os

from runners.errors import InputError

GROUP = "hydra/launcher"
EXTRAS = {  # what has to be installed for each: ours, in conf/hydra/launcher/, and those that they build on
    "workers": "joblib",
    "joblib": "joblib",
    "slurm": "submitit",
    "slurm_local": "submitit",
    "submitit_slurm": "submitit",
    "submitit_local": "submitit",
    "ray_local": "ray",
    "ray": "ray",
    "ray_aws": "ray",
}


def check_installed(launcher: str) -> None:
    """Refuse a launcher whose package is not there.

    Raises:
        InputError: saying how to install it.
    """
    extra = EXTRAS.get(launcher)
    if extra is not None and not _is_there(f"hydra_plugins.hydra_{extra}_launcher"):
        raise InputError(f'{GROUP}={launcher} is not installed: pip install "quantease-bench[{extra}]"')


def prepare_ray() -> None:
    """Set what Ray reads when it starts, unless the user has: no accounts, no reports of its use, GPUs left to us."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a job that asks Ray for no GPU sees none


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
