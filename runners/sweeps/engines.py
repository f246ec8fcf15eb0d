"""What Hydra's launchers lack: workers that end with their command, and a Ray that nobody else on the network can reach."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from runners.errors import InputError
from runners.project import ROOT

POLL_SECONDS = 0.5  # between two looks at the parent
# Ray listens on the loopback interface alone where it cannot form clusters, as on macOS. This variable says that it cannot.
RAY_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def prepared(launcher: DictConfig) -> Iterator[None]:
    """Prepare the launcher of a sweep, before Hydra makes it.

    Args:
        launcher: the configuration `hydra.launcher`; changed in place.

    Raises:
        InputError: there is no engine to give the cells to.
    """
    target = str(launcher.get("_target_", ""))
    if "joblib" in target:
        method = {"_target_": "hydra.utils.get_method", "path": f"{__name__}.end_with_command"}
        OmegaConf.update(launcher, "initializer", method, force_add=True)
    with _with_this_code(), _engine(target, launcher):
        yield


@contextmanager
def _with_this_code() -> Iterator[None]:
    """Have the processes that a launcher starts import this checkout, as the command does that begins with its run.py.

    Otherwise they could import another one that is installed, and write into its results.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def runs_elsewhere(launcher: DictConfig) -> bool:
    """Whether the cells of a sweep run on other machines than this one, as under Slurm or on a Ray that runs already."""
    target = str(launcher.get("_target_", ""))
    if target.endswith(".ray_launcher.RayLauncher"):
        return launcher.ray.init.get("address") != "local"
    return target.endswith((".SlurmLauncher", ".RayAWSLauncher"))


def _engine(target: str, launcher: DictConfig) -> AbstractContextManager[None]:
    if target.endswith(".ray_launcher.RayLauncher"):
        return _ray(launcher.ray.init)
    if "submitit" in target:
        from runners.sweeps import slurm  # an extra

        return slurm.slurm() if target.endswith(".SlurmLauncher") else slurm.ends_are_no_errors()
    return nullcontext()


@contextmanager
def _ray(options: DictConfig) -> Iterator[None]:
    """Start Ray, or join one, before the launcher does, which asks for a size of the object store even where it joins one.

    Raises:
        InputError: there is no Ray to join.
    """
    address = options.get("address")
    _set_environment(address)
    import ray  # after that: it reads the environment when it is imported
    from ray.exceptions import RayError

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**cast(dict[str, Any], OmegaConf.to_container(options, resolve=True)))
    except (ConnectionError, RayError) as error:
        raise InputError(
            f"there is no Ray at hydra.launcher.ray.init.address={address} ({str(error).splitlines()[0].rstrip('.')}): "
            "start one there (ray start --head), set RAY_AUTH_MODE=token if it asks for a token, or use "
            "hydra/launcher=ray_local"
        ) from error
    try:
        signal.signal(signal.SIGTERM, handler)  # Ray sets its own, which aborts the process
        yield
    finally:
        ray.shutdown()


def _set_environment(address: str | None) -> None:
    """Set what Ray reads from the environment, where the user has not: no usage reports, no open ports.

    GPUs are leased to cells by `runners.sweeps.gpus`, so Ray must leave CUDA_VISIBLE_DEVICES as it is.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a job that asks Ray for no GPU sees none
    if address == "local":
        os.environ[RAY_CLUSTERS] = "0"


def end_with_command() -> None:
    """In a worker process of a launcher: leave when the command that started it is gone, however it died.

    The worker's cell sees that, writes its metrics and leaves (`runners.sweeps.isolation`). Without this, workers would wait
    for their next cell for minutes.
    """
    command = multiprocessing.parent_process()
    if command is not None:
        threading.Thread(target=_leave_without, args=(command.pid,), daemon=True).start()


def _leave_without(command: int | None) -> None:
    while os.getppid() == command:  # its sentinel does not work: loky gives none to its workers
        time.sleep(POLL_SECONDS)
    os._exit(128 + signal.SIGTERM)
