"""Whether the Hugging Face hub answers, and why a download failed."""

import logging
import os
import urllib.error
import urllib.request
from functools import lru_cache

log = logging.getLogger(__name__)

HUB_TIMEOUT = 5.0  # seconds; once per process, so that a machine without network waits no longer than this


@lru_cache(maxsize=1)
def hub_answers() -> bool:
    """Whether the hub answers. If not, its clients are set to use their cache only, as they would retry for minutes."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True  # any status is an answer; a wrong token or name fails later, with the client's own message
    except (OSError, ValueError):
        log.debug("%s does not answer: using what is cached", endpoint)
        os.environ["HF_HUB_OFFLINE"] = "1"
        _set_offline()
        return False
    return True


def _set_offline() -> None:
    """Set the flag in the clients themselves: they read the environment when imported, which may have happened before."""
    import datasets
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True  # pyright: ignore[reportAttributeAccessIssue]


def why_not(error: Exception) -> str:
    """The reason for a failed download, in a few words: the clients' messages have many lines."""
    if not hub_answers():
        return "it does not answer, and nothing is cached"
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
