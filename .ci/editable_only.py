"""setuptools' build backend, but for wheels: a wheel would hold neither conf/ nor run.py, which live in the checkout."""

from typing import Any, NoReturn

from setuptools.build_meta import *  # noqa: F403 - every other hook is setuptools' own

SENTENCE = "QuantEase Bench runs from its checkout, which holds conf/ and results/: pip install -e . installs it there"


def get_requires_for_build_wheel(*_arguments: Any, **_settings: Any) -> NoReturn:
    """The first hook that a wheel's build calls, so that nothing is downloaded before it is refused."""
    raise SystemExit(SENTENCE)


def build_wheel(*_arguments: Any, **_settings: Any) -> NoReturn:
    """Called first where the requirements are not asked for (`pip wheel --no-build-isolation`)."""
    raise SystemExit(SENTENCE)
