"""What a number may depend on besides the settings: code, libraries and machine."""

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from runners.project import ROOT
from runners.storage.fingerprint import code_fingerprint

COMMAND = "QUANTEASE_COMMAND"  # in the environment: the command line as typed, also for the processes that it starts

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "hydra-core",
    "wandb",
    "lm-eval",
    "numpy",
    "numba",
    "triton",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Commit, versions of libraries, and the machine, for `environment.json`."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": versions(),
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def bug_report() -> str:
    """What a report of a bug needs of the process and the machine: one fact per line, whatever else goes wrong."""
    facts = environment(torch.device("cpu"))
    changed = " with uncommitted changes" * facts["uncommitted_changes"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return "\n".join(
        (
            f"command   {os.environ.get(COMMAND) or shlex.join(sys.orig_argv)}",
            f"process   {os.getpid()} on {socket.gethostname()}, in {Path.cwd()}",
            f"code      commit {facts['commit'] or 'unknown'}{changed}, {code_fingerprint()}",
            f"versions  python {facts['python']}, {packages}",
            f"machine   {facts['platform']}; {facts['processor']}; {facts['threads']} threads; {_host_memory()}",
            f"gpus      {', '.join(gpus) or 'none'}" + f", cuda {torch.version.cuda}" * bool(gpus),
        )
    )


def versions() -> dict[str, str | None]:
    """The versions of the libraries that a number may depend on; None: not installed."""
    return {name: _version(name) for name in PACKAGES}


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _git(*arguments: str) -> str | None:
    """The output of a git command in the project's checkout; None where there is no git or no checkout."""
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _host_memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB of memory"
    except (AttributeError, OSError, ValueError):  # Windows
        return "memory unknown"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
