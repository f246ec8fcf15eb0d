"""Where the project's own files are. Every path below the project's root starts from here."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the checkout: holds run.py, conf/ and results/
CONF = ROOT / "conf"


def user_cache() -> Path:
    """Where models that were fetched or converted are kept, for all checkouts of this user: `XDG_CACHE_HOME` moves it."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "quantease-bench"
