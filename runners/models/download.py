"""Fetch a checkpoint from the model hub: its configuration, tokenizer and safetensors, never its pickles or its code."""

import logging
from pathlib import Path
from typing import Any

from runners.errors import InputError
from runners.hub import hub_answers, why_not

log = logging.getLogger(__name__)

# All that a run reads. Repositories often hold the same weights in several other formats, which would cost hours.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]


def download_snapshot(path: str, revision: str | None) -> tuple[Path, str]:
    """Download a repository of the hub, or find it in the hub's cache.

    Args:
        path: the repository, as `owner/name`.
        revision: branch, tag or commit; None: the main branch, or its conversion to safetensors where it has only pickles.

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
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=PATTERNS))
    except InputError:
        raise
    except Exception as error:  # the client raises a dozen classes, those of its HTTP library among them
        raise InputError(
            f"the model {path} is not a folder here, and cannot be downloaded from the hub ({why_not(error)}). Go online, "
            "or take a folder: model=local model.path=FOLDER"
        ) from error
    return folder, folder.name  # the hub's cache names the folder of a snapshot by its commit


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
