"""Hydra's launchers run the cells of a sweep in several processes or on several machines: `hydra/launcher=...`."""

import importlib.util

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
    "ray_cluster": "ray",
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
        raise InputError(f'{GROUP}={launcher} is not installed: pip install -e ".[{extra}]"')


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
