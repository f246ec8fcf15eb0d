"""The shape of the project: which way imports point, that configurations are complete, that the README is true."""

import ast
import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from runners.config.command_line import check
from runners.results.metrics import REFERENCE, Status
from tests.conftest import PROJECT

PACKAGES = ["quantease", "baselines", "runners", "analysis"]
ALLOWED = {  # own packages that each may import; the direction of all imports
    "quantease": {"quantease"},
    "baselines": {"baselines", "quantease"},
    "runners": {"runners", "quantease"},  # methods reach it through their YAML files
    "analysis": {"analysis", "runners"},  # of runners only what ANALYSIS_READS names
}
ANALYSIS_READS = {
    "runners.results.metrics",
    "runners.results.seal",
    "runners.results.studies",
    "runners.errors",
    "runners.project",
    "runners.arguments",
}  # light modules: none needs torch
COMMANDS = {"cli", "status", "sync", "reports"}  # modules of runners/ that a person starts
# The rooms of runners/ from the ground up, and which other rooms each may import. This is the architecture:
# runners/README.md shows it. A room imports only what is listed above it, so there is no circle. All may import the
# foundations, the modules beside the rooms that are no commands.
ROOMS: dict[str, str] = {
    "storage": "",
    "results": "storage",
    "data": "storage results",
    "gguf_files": "storage",
    "fetch": "storage gguf_files",
    "formats": "",
    "models": "gguf_files formats",
    "quantization": "storage gguf_files formats models results",
    "evaluation": "storage data models results quantization",
    "config": "storage data fetch models results",
    "tracking": "results config",
    "run": "storage data models results quantization evaluation config tracking",
    "sweeps": "storage results config run",
    "prune": "gguf_files results tracking sweeps",
    "kept": "storage data models results quantization config",
    "audit": "storage models results quantization evaluation config run kept",
    "export": "storage models results quantization evaluation formats run kept",
    "benchmark": "storage models results quantization config run",
    "pretrain": "storage data evaluation",
    "commands": "results config run sweeps tracking",
}
LONGEST_FUNCTION = 40  # lines: what fits on a screen
LONGER = {"_run"}  # a Triton kernel, which cannot be cut up
MOST_MODULES = 13
MODELS = sorted(path.stem for path in (PROJECT / "conf" / "model").glob("*.yaml"))


def modules(file: Path) -> set[str]:
    """The dotted names that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(file: Path) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    return {name.split(".")[0] for name in modules(file)}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_needs_the_tests(package: str) -> None:
    assert not [file for file in (PROJECT / package).rglob("*.py") if "tests" in imports(file)]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    for file in (PROJECT / package).rglob("*.py"):
        compares = {"baselines"} if file.parent.name == "benchmark" else set()  # it times methods by name
        assert imports(file) & set(PACKAGES) <= ALLOWED[package] | compares, file


def test_the_analysis_reads_the_schema_of_results_and_little_else_of_runners() -> None:
    for file in (PROJECT / "analysis").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("runners")], file
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("runners"):
                for alias in node.names:
                    assert {node.module, f"{node.module}.{alias.name}"} & ANALYSIS_READS, (file, node.lineno)


OTHER_WORDS = {  # equal to a word of the schema, with another meaning
    ("datasets.py", "missing"),  # the version of a data set that is not there, a part of digests
    ("task_rows.py", "missing"),
    ("run.py", "zero_shot/"),  # the name of a task's data in a run's identity
    ("arguments.py", "interrupted"),  # what a command says when it is
    ("progress.py", "done"),  # the number of steps, a key of progress.json
}


@pytest.mark.parametrize("package", ["analysis", "runners"])
def test_keys_and_states_of_results_are_written_in_the_schema_only(package: str) -> None:
    measured = ("ppl", "protocol", "windows", "sha256", "agreement", "zero_shot")
    families = (*measured, "skipped", "warnings", "layers", "quantize", "evaluate")
    prefixes = tuple(f"{family}/" for family in families)
    schema = PROJECT / "runners" / "results" / "metrics.py"
    for file in set((PROJECT / package).rglob("*.py")) - {schema}:
        if "notebooks" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if (file.name, text) not in OTHER_WORDS:
                assert text not in {*Status, REFERENCE}, (file, text)
                assert not text.startswith(prefixes), (file, text)


def room(parts: tuple[str, ...]) -> str:
    """The room of a module of runners/, from the parts of its path or dotted name after `runners`."""
    if parts[0] in COMMANDS:
        return "commands"
    return parts[0] if (PROJECT / "runners" / parts[0]).is_dir() else "foundations"


def rooms_imported(file: Path) -> set[str]:
    names = {tuple(name.split(".")[1:]) for name in modules(file) if name.startswith("runners.")}
    return {room(name) for name in names}


def test_the_rooms_import_what_their_table_says_and_no_more() -> None:
    found: dict[str, set[str]] = {name: set() for name in (*ROOMS, "foundations")}
    for file in (PROJECT / "runners").rglob("*.py"):
        if file.name != "__init__.py" or file.parent.name != "runners":
            here = room((*file.relative_to(PROJECT / "runners").parts[:-1], file.stem))
            found[here] |= rooms_imported(file) - {here, "foundations"}
    assert found == {name: set(others.split()) for name, others in ROOMS.items()} | {"foundations": set()}


def test_no_room_imports_one_above_it() -> None:
    names = list(ROOMS)
    for place, others in enumerate(ROOMS.values()):
        assert set(others.split()) <= set(names[:place]), names[place]


def test_the_sign_on_the_door_of_the_runners_shows_the_table() -> None:
    readme = (PROJECT / "runners" / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines() if "|" in line]
    table = {row[0].strip("`/"): row[2] for row in rows if len(row) == 3 and row[0].strip("`/") in ROOMS}
    assert table == ROOMS


def test_every_module_and_room_of_the_runners_has_a_sign() -> None:
    for file in [*(PROJECT / "runners").rglob("*.py"), *(PROJECT / "analysis").rglob("*.py")]:
        if file.parts[-2] != "notebooks":
            assert ast.get_docstring(ast.parse(file.read_text())), file


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_no_folder_is_crowded(package: str) -> None:
    for folder in {file.parent for file in (PROJECT / package).rglob("*.py")}:
        found = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(found) <= MOST_MODULES, folder


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_fit_on_a_screen(package: str) -> None:
    for file in (PROJECT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in LONGER:
                assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, (file, node.name)


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[Path]] = {}
    for file in (file for package in PACKAGES for file in (PROJECT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(file)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_the_mathematics_needs_torch_and_nothing_else() -> None:
    compilers = {"cpu.py": {"numba", "numpy"}, "cuda.py": {"triton"}}  # of quantease/kernels
    for package in ("quantease", "baselines"):
        for file in (PROJECT / package).rglob("*.py"):
            others = imports(file) - set(sys.stdlib_module_names) - {"torch", "quantease", "baselines"}
            assert others == (compilers.get(file.name, set()) if file.parent.name == "kernels" else set()), file


def test_compilers_are_imported_only_when_they_are_needed() -> None:
    code = "import quantease.coordinate_descent, baselines.spqr, sys; assert not {'numba', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)


def test_the_analysis_imports_no_torch() -> None:
    code = "import analysis.__main__, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)


@pytest.mark.parametrize("path", sorted((PROJECT / "conf" / "method").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_methods_file_lists_every_setting(path: Path) -> None:
    (settings,) = check([f"method={path.stem}"], multirun=False)
    assert settings.run.method.name == path.stem
    text = path.read_text()
    if settings.run.method.solver is not None and "defaults:" not in text:
        names = {field.name for field in dataclasses.fields(settings.run.method.solver)}  # pyright: ignore[reportArgumentType]
        assert names == set(re.findall(r"^(\w+):", text, re.MULTILINE)) - {"name", "_target_"}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_composes(name: str) -> None:
    extra = ["model.path=facebook/opt-125m"] if name == "local" else []
    (settings,) = check([f"model={name}", *extra], multirun=False)
    assert settings.run.model.name == ("opt-125m" if name == "local" else name)
    assert name in ("local", "tiny") or settings.run.model.dtype is None  # whatever the checkpoint has


def test_the_models_of_the_papers_are_all_there() -> None:
    sizes = {
        "opt": "125m 350m 1.3b 2.7b 6.7b 13b 30b 66b",
        "bloom": "560m 1b1 1b7 3b 7b1 176b",
        "falcon": "7b 40b 180b",
        "pythia": "70m 160m 410m 1b 1.4b 2.8b 6.9b 12b",
        "qwen3": "0.6b 1.7b 4b 8b",
        "llama-2": "7b 13b 70b",
        "llama-3": "8b 70b",
        "mistral": "7b",
    }
    assert {f"{family}-{size}" for family, names in sizes.items() for size in names.split()} <= set(MODELS)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_runs_code_that_it_was_given(package: str) -> None:
    for file in (PROJECT / package).rglob("*.py"):
        tree = ast.parse(file.read_text())
        assert not imports(file) & {"pickle", "dill", "joblib", "marshal", "shelve"}, file
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "torch.load", "os.system"), (file, node.lineno)
            if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
                assert (node.arg, node.value.value) not in (("trust_remote_code", True), ("shell", True)), file


def test_the_bundled_model_is_small_and_safe() -> None:
    folder = PROJECT / "runners" / "tiny"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors", ".md", ".csv"}


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = (PROJECT / "CITATION.cff").read_text(encoding="utf-8")
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
