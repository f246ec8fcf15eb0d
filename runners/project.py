"""Where the project's own files are. Every path below the project's root starts from here."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the checkout: holds run.py, conf/ and results/
CONF = ROOT / "conf"


def user_cache() -> Path:
    """Where models that were fetched or converted are kept, for all checkouts of this user: `XDG_CACHE_HOME` moves it."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "quantease-bench"


def results_folder() -> Path:
    """The folder of all studies, unless `results=` names another: the project's, from whatever folder a command is given.

    In the project's own folder the path is short, `results`, as it is shown and kept with every run.
    """
    return Path("results") if os.path.samefile(os.curdir, ROOT) else ROOT / "results"
