"""What names a cached or half-finished result: a module that is renamed or edited changes it, and can never leave it."""

import shutil
from pathlib import Path

import pytest

from runners.project import ROOT
from runners.run.keys import OF_ACTIVATIONS
from runners.storage.fingerprint import CODE, code_fingerprint

COVERED = sorted({file.relative_to(ROOT) for pattern in CODE for file in ROOT.glob(pattern)})


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's modules in a folder where they may be renamed."""
    root = tmp_path_factory.mktemp("project")
    for file in COVERED:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    return root


def key(root: Path, *patterns: str) -> str:
    return code_fingerprint.__wrapped__(*patterns, root=root)  # not what was remembered of an earlier call


def test_a_copy_has_the_same_key(copy: Path) -> None:
    assert key(copy) == key(ROOT)
    assert key(copy, *OF_ACTIVATIONS) == key(ROOT, *OF_ACTIVATIONS)


def test_every_package_that_can_change_a_number_is_covered_to_any_depth() -> None:
    for package in ("quantease", "baselines", "runners"):
        assert {file.relative_to(ROOT) for file in (ROOT / package).rglob("*.py")} <= set(COVERED)


@pytest.mark.parametrize("file", COVERED, ids=str)
def test_renaming_a_module_changes_the_resume_key(copy: Path, file: Path) -> None:
    before, renamed = key(copy), (copy / file).with_name("renamed_" + file.name)
    (copy / file).rename(renamed)
    try:
        assert key(copy) != before
    finally:
        renamed.rename(copy / file)
    assert key(copy) == before


def test_renaming_one_of_a_room_of_modules_changes_the_key(copy: Path) -> None:
    for pattern in (pattern for pattern in OF_ACTIVATIONS if "*" in pattern):
        before, file = key(copy, *OF_ACTIVATIONS), next(iter(sorted(copy.glob(pattern))))
        file.rename(file.with_name("renamed.py"))
        try:
            assert key(copy, *OF_ACTIVATIONS) != before
        finally:
            file.with_name("renamed.py").rename(file)


@pytest.mark.parametrize("file", [pattern for pattern in OF_ACTIVATIONS if "*" not in pattern])
def test_renaming_a_module_that_makes_activations_cannot_go_unnoticed(copy: Path, file: str) -> None:
    renamed = (copy / file).with_name("renamed.py")
    (copy / file).rename(renamed)
    try:
        with pytest.raises(LookupError, match=rf"matches {file}"):
            key(copy, *OF_ACTIVATIONS)
    finally:
        renamed.rename(copy / file)


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(LookupError, match=r"no file below .* matches runners/nothing/\*\*/\*\.py"):
        code_fingerprint("runners/nothing/**/*.py")
