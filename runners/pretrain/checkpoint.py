"""The state of a training on disk, in safetensors.

A checkpoint is written under a temporary name and renamed, and only then is the one before deleted: whenever the process
is killed, a complete checkpoint is on disk.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from runners.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of one parameter


class Checkpoints:
    """The checkpoints of one training run.

    Args:
        folder: holds them as `checkpoint-<step>`.
        identity: hash of the settings and the tokens. A checkpoint of another identity is refused, because the history of
            the result would be that of two trainings.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]]) -> None:
        """Write the state after the last step of `history`."""
        step = history[-1]["step"]
        partial, final = self.folder / "checkpoint.partial", self.folder / f"checkpoint-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(
            {name: p.detach().contiguous() for name, p in model.named_parameters()}, partial / "model.safetensors"
        )
        moments = {
            f"{name}/{key}": optimizer.state[parameter][key].detach().contiguous()
            for name, parameter in model.named_parameters()
            for key in MOMENTS
        }
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"identity": self.identity, "history": history}))
        partial.replace(final)
        for old in self._all()[:-1]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """Restore the newest state in place; returns its history, empty where there is nothing to restore.

        Raises:
            InputError: the folder holds the training of another model or text.
        """
        if not (found := self._all()):
            return []
        state = json.loads((found[-1] / "state.json").read_text())
        if state["identity"] != self.identity:
            raise InputError(f"{found[-1]} belongs to a training with other settings: delete it, or set output=FOLDER")
        weights, moments = load_file(found[-1] / "model.safetensors"), load_file(found[-1] / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
                optimizer.state[parameter] = {key: moments[f"{name}/{key}"].to(parameter.device) for key in MOMENTS}
        return state["history"]

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
