"""Whether the Hugging Face hub answers, and why something cannot be had from it."""

import logging
import os
import urllib.error
import urllib.request
from functools import lru_cache

log = logging.getLogger(__name__)

HUB_TIMEOUT = 5.0  # seconds


@lru_cache(maxsize=1)
def hub_answers() -> bool:
    """Whether the hub answers. If not, its client is told to use what it has cached, or it would retry for minutes."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        log.debug("%s does not answer: using what is cached", endpoint)
        os.environ["HF_HUB_OFFLINE"] = "1"
        _set_offline()
        return False
    return True


def _set_offline() -> None:
    """The hub's clients read their environment when they are imported, which may have happened already."""
    import datasets
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True  # pyright: ignore[reportAttributeAccessIssue]


def why_not(error: Exception) -> str:
    """Why something cannot be had from the hub, in a few words."""
    if not hub_answers():
        return "it does not answer, and nothing is cached"
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
