"""`python -m runners.prune study=NAME`: what of a study can go, and how large it is; `delete=true` removes it.

Without `delete=true` nothing is touched. A run that a process works on stays; so do offline runs of W&B that were not sent.
"""

from pathlib import Path
from typing import Annotated

from runners.arguments import start
from runners.console import console
from runners.errors import InputError
from runners.names import check_name
from runners.project import results_folder
from runners.prune.converted import converted_leftovers
from runners.prune.removable import Removable, unused
from runners.prune.runs import Which, leftovers, removable_runs
from runners.prune.tracked import has_project, tracked_leftovers


def main(
    study: Annotated[str, "name of the study"],
    results: Annotated[Path | None, "folder of all studies (default: results/ of the project)"] = None,
    runs: Annotated[
        Which, "failures; not_done, also those that could go on; all, also damaged ones; none"
    ] = "failures",
    cache: Annotated[
        bool,
        "also what studies share and is made again when needed: the folder cache, GGUF files converted by old code",
    ] = False,
    delete: Annotated[bool, "remove what is listed"] = False,
) -> None:
    """List what of a study can go, with its size; with delete=true, remove it."""
    results = results or results_folder()
    folder = results / check_name("study", study)
    if not folder.is_dir() and not has_project(folder):
        raise InputError(f"there is no study {folder.absolute()}: set study=NAME, and results=PATH if it is elsewhere")
    found = list(removable_runs(folder, runs))
    gone = {each.path for each in found}
    found += [*leftovers(folder, gone), *tracked_leftovers(folder, gone)]
    if cache:
        found += [unused(results / "cache", "shared by runs")] if (results / "cache").is_dir() else []
        found += converted_leftovers()
    _list(found, delete)


def _list(found: list[Removable], delete: bool) -> None:
    left = 0
    for each in found:
        is_gone = each.removed() if delete else True
        left += 0 if is_gone else 1
        why = each.why if is_gone else "kept: a process works on it"
        console.print(f"{each.size / 1e6:10.1f} MB  {each.path}  ({why})", highlight=False, soft_wrap=True)
    what = f"{len(found) - left} of {len(found)} removed" if delete else f"{len(found)} can go"
    size = sum(each.size for each in found) / 1e6
    console.print(f"{what}, {size:.1f} MB" + "; delete=true removes them" * (bool(found) and not delete))


if __name__ == "__main__":
    start(main)
