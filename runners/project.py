"""Where the project's own files are. Every path below the project's root starts from here."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the checkout: holds run.py, conf/ and results/
CONF = ROOT / "conf"
