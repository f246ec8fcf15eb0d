"""Whether W&B is wanted, has credentials, and answers: found out in seconds, as its own client waits for minutes."""

import json
import logging
import os
import ssl
import threading
import urllib.error
import urllib.request
from functools import lru_cache

log = logging.getLogger(__name__)

SECONDS = 4.0  # for the server to answer; once per process
DISABLED = "disabled"
OFFLINE = ("offline", DISABLED, "dryrun")  # values of WANDB_MODE with which W&B asks no server
MODES = ("online", "run", "shared", *OFFLINE)
QUESTION = json.dumps({"query": "{ viewer { id } }"}).encode()  # which W&B answers to anybody


def is_disabled() -> bool:
    """Whether the user wants nothing of W&B, not even files: `WANDB_MODE=disabled`, or `WANDB_DISABLED`."""
    return os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on") or _mode() == DISABLED


def logged_in() -> bool:
    """Whether W&B has credentials and is allowed to use them; neither asks for any nor asks a server."""
    if _mode() in OFFLINE:
        return False
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))  # or login asks the server for the user's name, to greet them
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error:
        return False


@lru_cache(maxsize=1)
def answers() -> bool:
    """Whether the server of W&B answers as one, whatever the answer is."""
    import wandb

    address = wandb.setup().settings.base_url.rstrip("/") + "/graphql"
    found: list[bool] = []
    # In a thread, as a timeout of urllib holds for each step alone, and for none of looking up the name.
    thread = threading.Thread(target=lambda: found.append(_asked(address)), daemon=True)
    thread.start()
    thread.join(SECONDS)
    return found == [True]


def _asked(address: str) -> bool:
    request = urllib.request.Request(address, QUESTION, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            json.load(answer)  # a network that wants its users to log in first answers with a page
    except urllib.error.HTTPError as error:
        return error.code < 500  # a proxy that does not reach the server says 502 to 504
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # W&B's client may know certificates that Python does not
    except (OSError, ValueError):
        return False
    return True


def _mode() -> str:
    """What the environment says, or else the settings that `wandb offline` and `wandb disabled` write."""
    mode = os.environ.get("WANDB_MODE")
    if mode in MODES:
        return mode
    if mode is not None:  # with which W&B would start no run at all
        log.warning("WANDB_MODE=%s is ignored: it must be one of %s", mode, ", ".join(MODES))
        del os.environ["WANDB_MODE"]
    import wandb

    return wandb.setup().settings.mode
