"""`python -m runners.pretrain`; every key of conf/pretrain.yaml can be set as in run.py."""

import logging
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from transformers.utils import logging as transformers_logging

from runners.errors import InputError
from runners.pretrain.export import export, write_card
from runners.pretrain.training import train
from runners.project import CONF
from runners.quoting import setting

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="pretrain")
def main(cfg: DictConfig) -> None:
    """Train, from the last checkpoint if there is one, and export the model."""
    transformers_logging.disable_progress_bar()
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        model, tokenizer, history = train(cfg, output)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "a CPU"
    export(model, tokenizer, history, output / "model")
    write_card(model, tokenizer, cfg, output / "model", device, history)
    command = f"python run.py model=local {setting('model.path', output / 'model')}"
    log.info("exported to %s: %s", output / "model", command)


if __name__ == "__main__":
    main()
