"""Every causal LM of transformers is walked as its own forward pass, or refused, as the README of runners/models says."""

import re
from collections.abc import Iterator

import pytest

from tests import family_table
from tests.family_zoo import ALL_FAMILIES

SAMPLE = [  # of each verdict, and of each kind of block: attention, experts, recurrences, shared keys, encoders
    "bert", "bloom", "codegen", "deepseek_v3", "dory", "falcon", "gemma3_text", "gemma4_text", "gpt2", "gpt_neo",
    "helium", "lfm2", "mamba", "mixtral", "mpt", "opt", "phi3", "qwen3_moe", "qwen3_next", "whisper", "zamba",
]  # fmt: skip

RIGHT_REASONS = (  # why a family may be refused: a walk, one block after the other, is not its forward pass
    "several lists of modules",  # no list is all of the blocks: encoders in a decoder, attention apart from its MLP
    "more than once",  # recurrent depth
    r"receives .* sequences, not",  # several streams where a hidden state is expected
    "cannot be run one after the other",  # blocks that are called with something else than one hidden state
    "changes the predictions of tokens before it",  # an encoder: perplexity would mean nothing
    "does some work between the two",  # of two blocks
    "where the blocks before it run",  # state that earlier blocks have made
    "is not what the walk has there",  # likewise
    "depend on the batch size",  # likewise: state of one batch that reaches another
    "share",  # one weight in several blocks: its codes would have to fit the inputs of all
)


@pytest.fixture(autouse=True, scope="module")
def _limited() -> Iterator[None]:
    with family_table.limited():
        yield


def _unrounded(family: str, verdicts: dict[str, str]) -> dict[str, str]:
    """The verdicts without the mention of a rounding, which depends on the processor and on where a file's tensors begin."""
    plain = {name: verdict.removesuffix(" but for rounding") for name, verdict in verdicts.items()}
    return {family: "equal"} if set(plain.values()) == {"equal"} else plain


def check(family: str) -> None:
    """The family's rows in the table are what it does now."""
    if family not in ALL_FAMILIES:
        pytest.skip(f"transformers does not know {family}")
    found = family_table.named(family)
    if family_table.is_of_these_versions():
        assert _unrounded(family, found) == _unrounded(family, family_table.committed_of(family))
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
    assert [family for family in ALL_FAMILIES if not family_table.committed_of(family)] == []


def test_what_is_refused_is_refused_for_the_right_reason() -> None:
    for verdict in family_table.committed():
        state, _, reason = verdict.partition(": ")
        assert state in ("equal", "equal but for rounding", "refused", "not built"), verdict
        assert state != "refused" or any(re.search(right, reason) for right in RIGHT_REASONS), verdict
