"""Quantize one language model with one method and measure what that costs; `-m` sweeps. See `python run.py --help`."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while libraries load there is nothing to put in order, nor to say

import hydra
from omegaconf import DictConfig

from runners import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run one cell."""
    return cli.job(cfg)


if __name__ == "__main__":
    cli.start(main)
