"""The project is installed from its checkout: a wheel, which would have no conf/, is refused in a sentence."""

import subprocess
import sys
import tomllib
from pathlib import Path

from tests.conftest import PROJECT


def backend(code: str) -> subprocess.CompletedProcess[str]:
    """Run code after importing the backend that pyproject.toml names, as pip does."""
    build_system = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    (folder,) = build_system["backend-path"]
    script = f"import sys; sys.path.insert(0, {folder!r}); import {build_system['build-backend']} as backend; {code}"
    return subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True)


def test_a_wheel_is_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    for call in ("get_requires_for_build_wheel()", f"build_wheel({str(tmp_path)!r})"):
        answer = backend(f"backend.{call}")
        assert answer.returncode == 1
        assert "pip install -e ." in answer.stderr
        assert "Traceback" not in answer.stderr
    assert not list(tmp_path.iterdir())


def test_an_editable_install_is_built_by_setuptools() -> None:
    hooks = ("get_requires_for_build_editable", "prepare_metadata_for_build_editable", "build_editable")
    same = " and ".join(f"backend.{hook} == setuptools.build_meta.{hook}" for hook in hooks)
    answer = backend(f"import setuptools.build_meta; assert {same}; assert backend.build_editable")
    assert answer.returncode == 0, answer.stderr
