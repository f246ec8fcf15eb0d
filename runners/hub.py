"""The Hugging Face hub: whether it answers, why a download failed, and how a checkpoint is fetched from it."""

import logging
import os
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path
from typing import Any

from runners.errors import InputError

log = logging.getLogger(__name__)

# All that a run reads. Repositories often hold the same weights in several other formats, which would cost hours.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]
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


def download_snapshot(path: str, revision: str | None, patterns: list[str] = PATTERNS) -> tuple[Path, str]:
    """Download a repository of the hub, or find it in the hub's cache.

    Args:
        path: the repository, as `owner/name`.
        revision: branch, tag or commit; None: the main branch, or its conversion to safetensors where it has only pickles.
        patterns: of the names of the files to download.

    Returns:
        The folder of the snapshot, and the commit that it is of.

    Raises:
        InputError: the repository cannot be reached, or holds no safetensors.
    """
    # Imported here: a run on a local folder needs no hub client, which takes a while to import.
    from huggingface_hub import HfApi, snapshot_download

    online = hub_answers()  # without this question, the client retries for minutes
    try:
        if online:
            api = HfApi()
            files = api.list_repo_files(path, revision=revision)
            # A revision that the user named is taken as it is, so that it cannot be silently another one.
            if revision is None and not any(file.endswith(".safetensors") for file in files):
                revision = _converted_revision(api, path)
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except InputError:
        raise
    except Exception as error:  # the client raises a dozen classes, those of its HTTP library among them
        raise InputError(
            f"the model {path} is not a folder here, and cannot be downloaded from the hub ({why_not(error)}). Go online, "
            "or take a folder: model=local model.path=FOLDER"
        ) from error
    return folder, folder.name  # the hub's cache names the folder of a snapshot by its commit


def cached_file(path: str, revision: str | None, name: str) -> Path | None:
    """A file of a repository in the hub's cache; None: it is not there. The hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(path, name, revision=revision)
    except Exception:  # such as of a name that cannot be a repository's
        return None
    return Path(found) if isinstance(found, str) else None  # the cache may also know that there is no such file


def _converted_revision(api: Any, path: str) -> str:
    """The hub's own conversion to safetensors, which waits as a pull request in repositories that only hold pickles."""
    for discussion in api.get_repo_discussions(path, author="SFconvertbot", discussion_status="open"):
        if discussion.is_pull_request and "safetensors" in discussion.title:
            log.info("%s holds pickled weights: taking the hub's conversion, %s", path, discussion.git_reference)
            return discussion.git_reference
    raise InputError(
        f"{path} holds pickled weights only, and unpickling runs code: ask the hub's safetensors converter for a pull "
        "request and name it with model.revision=refs/pr/NUMBER"
    )
