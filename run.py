"""Quantize one language model with one method and measure what that costs; `-m` sweeps. See `python run.py --help`."""

import hydra
from omegaconf import DictConfig

from runners import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run one cell."""
    return cli.job(cfg)


if __name__ == "__main__":
    cli.start(main)
