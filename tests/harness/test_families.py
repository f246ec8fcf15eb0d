"""Every causal LM of transformers is walked as its own forward pass, or refused, as the README of runners/models says."""

from collections.abc import Iterator

import pytest

from tests import family_table
from tests.family_zoo import ALL_FAMILIES

SAMPLE = [  # of each verdict, and of each kind of block: attention, experts, recurrences, shared keys, encoders
    "bert", "bloom", "codegen", "deepseek_v3", "dory", "falcon", "gemma3_text", "gemma4_text", "gpt2", "gpt_neo",
    "helium", "lfm2", "mamba", "mixtral", "mpt", "opt", "phi3", "qwen3_next", "whisper", "zamba",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _limited() -> Iterator[None]:
    with family_table.limited():
        yield


def check(family: str) -> None:
    """The family's rows in the table are what it does now."""
    if family not in ALL_FAMILIES:
        pytest.skip(f"transformers does not know {family}")
    found = family_table.named(family)
    if family_table.is_of_these_versions():
        assert found == family_table.committed(family)
    else:  # the table is of other versions: what is not equal must at least be refused
        assert not [name for name, verdict in found.items() if verdict.startswith(("different", "crashed"))]


@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_of_families_does_what_the_table_says(family: str) -> None:
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family not in SAMPLE])
def test_every_family_does_what_the_table_says(family: str) -> None:
    check(family)


def test_every_family_is_in_the_table() -> None:
    if not family_table.is_of_these_versions():
        pytest.skip("the table is of other versions of torch and transformers")
    assert [family for family in ALL_FAMILIES if not family_table.committed(family)] == []
