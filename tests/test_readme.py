"""What the READMEs promise: size, links, table and commands; and that a method can be pasted from them."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

from quantease.grid import GridSpec
from quantease.layer import LayerProblem
from runners.config.command_line import check
from tests.conftest import PROJECT

FOLDERS = ("conf", "quantease", "baselines", "runners", "analysis", "results", "tests")
LONGEST = 8_000  # bytes of the first README: one sitting
SIGN = 10_000  # of a folder's own


def markdown_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=PROJECT, capture_output=True, text=True).stdout.split()
    return [PROJECT / name for name in listed] or [PROJECT / "README.md"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_has_a_sign_at_its_door(folder: str) -> None:
    assert 1_000 < (PROJECT / folder / "README.md").stat().st_size <= SIGN


def test_the_first_readme_is_read_in_one_sitting() -> None:
    assert (PROJECT / "README.md").stat().st_size <= LONGEST


@pytest.mark.parametrize("file", markdown_files(), ids=lambda file: file.relative_to(PROJECT).as_posix())
def test_every_link_leads_to_a_file(file: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if not link.startswith(("http", "#")):
            assert (file.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("file", markdown_files(), ids=lambda file: file.relative_to(PROJECT).as_posix())
def test_every_module_that_is_named_exists(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for name in re.findall(
        r"(?<![\w/.])((?:quantease|baselines|runners|analysis|tests|conf)/[\w/]+\.(?:py|yaml))", text
    ):
        assert (PROJECT / name).exists() or "mine" in name, name


def test_the_commands_of_the_readme_compose() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    commands = [line.split("   ")[0].split()[2:] for line in text.splitlines() if line.startswith("python run.py ")]
    assert len(commands) >= 3
    for words in commands:
        overrides = [word.replace("FOLDER", str(PROJECT / "runners" / "tiny")) for word in words if word != "-m"]
        assert check(overrides, multirun="-m" in words)


@pytest.mark.parametrize("readme", ["README.md", "baselines/README.md"])
def test_a_method_pasted_from_the_readme_works(readme: str, tmp_path: Path) -> None:
    text = (PROJECT / readme).read_text(encoding="utf-8")
    code = re.search(r"```python\n(# baselines/mine\.py\n.*?)```", text, re.DOTALL)
    assert code is not None
    file = tmp_path / "mine.py"
    file.write_text(code[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mine", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    layer = module.Mine().solve(LayerProblem(weight, torch.eye(16)), GridSpec(4))
    assert (layer.weight - weight).abs().max() <= layer.grid.scale.max()
