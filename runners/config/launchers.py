"""Hydra's launchers run the cells of a sweep in several processes or on several machines: `hydra/launcher=...`."""

import importlib.util
import os

from runners.errors import InputError

GROUP = "hydra/launcher"
EXTRAS = {  # the extra of pyproject.toml that each launcher needs: ours in conf/hydra/launcher/, and Hydra's own
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
    """Refuse a launcher whose package is not installed.

    Raises:
        InputError: the package is missing; the sentence has the command that installs it.
    """
    extra = EXTRAS.get(launcher)
    if extra is not None and not _is_there(f"hydra_plugins.hydra_{extra}_launcher"):
        raise InputError(f'{GROUP}={launcher} is not installed: pip install "quantease-bench[{extra}]"')


def prepare_ray() -> None:
    """Set the environment that Ray reads when it starts, where the user has not: no accounts, no usage reports.

    GPUs are leased to cells by `runners.sweeps.gpus`, so Ray must leave CUDA_VISIBLE_DEVICES as it is.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a job that asks Ray for no GPU sees none


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
