"""What the walk takes for granted is checked: each thing that a model can do against it is refused, by its name."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from runners.errors import InputError
from runners.models.blocks import InMemoryModel
from runners.models.walk_check import Rounding, check_walk
from tests.families import FAMILIES, LENGTH, random_ids, random_model

Pass = Callable[[Any, Tensor], Tensor]  # the decoder and the embedded tokens -> what enters the last norm


def llama(forward: Pass | None = None, blocks: int = 3) -> Any:
    """A random Llama, whose blocks are run by `forward` instead of one after the other."""
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.num_hidden_layers = blocks
    model: Any = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    decoder = model.model
    if forward is not None:

        def run(input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
            return BaseModelOutputWithPast(decoder.norm(forward(decoder, decoder.embed_tokens(input_ids))))

        decoder.forward = run
    return model


def run_block(decoder: Any, index: int, hidden: Tensor, **others: Any) -> Tensor:
    """A block with the position embeddings that it needs; without a mask it is causal."""
    positions = torch.arange(hidden.shape[1])[None]
    return decoder.layers[index](hidden, position_embeddings=decoder.rotary_emb(hidden, positions), **others)


def run_blocks(decoder: Any, hidden: Tensor, order: Iterable[int] = range(3), **others: Any) -> Tensor:
    for index in order:
        hidden = run_block(decoder, index, hidden, **others)
    return hidden


def reason(model: Any) -> str:
    """The sentence with which it is refused."""
    with pytest.raises(InputError) as refused:
        check_walk(InMemoryModel(model), random_ids(4))
    return str(refused.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_are_walked_are_so_bit_for_bit(family: str) -> None:
    rounding = check_walk(InMemoryModel(random_model(family)), random_ids(4))
    assert rounding.same_batch == 0
    assert rounding.other_batch <= 1e-5 < rounding.allowed


@pytest.mark.parametrize("length", [2, LENGTH])
def test_the_made_up_model_is_walked_as_long_as_it_does_nothing_else(length: int) -> None:
    assert check_walk(InMemoryModel(llama(run_blocks)), random_ids(1, length)).same_batch == 0
    assert check_walk(InMemoryModel(llama()), torch.full((2, length), 7)).same_batch == 0  # one token alone


def test_blocks_in_loops_are_refused() -> None:
    def loops(decoder: Any, hidden: Tensor) -> Tensor:
        return run_blocks(decoder, hidden, (0, 1, 1, 2))

    assert "LlamaForCausalLM cannot be taken" in reason(llama(loops))
    assert "runs block 1 more than once" in reason(llama(loops))
    assert "runs blocks 0 to 2 more than once" in reason(llama(lambda *a: run_blocks(*a, order=(0, 1, 2, 0, 1, 2))))


@pytest.mark.skipif(not hasattr(transformers, "DoryConfig"), reason="this transformers has no Dory")
def test_a_family_with_loops_is_refused() -> None:
    config = transformers.DoryConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, n_input_layers=2, n_output_layers=2, n_recurrent_loops=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match="runs blocks 2 to 3 more than once"):
        check_walk(InMemoryModel(model), random_ids(4) % 64)


@pytest.mark.parametrize("order", [(0, 1), (0, 2, 1)])
def test_blocks_that_are_left_out_or_in_another_order_are_refused(order: tuple[int, ...]) -> None:
    assert "its forward pass runs blocks [0, " in reason(llama(lambda *a: run_blocks(*a, order=order)))


@pytest.mark.parametrize("change", [lambda hidden: hidden * 1.001, lambda hidden: hidden.mul_(1.001), torch.clone])
def test_work_between_blocks_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    def between(decoder: Any, hidden: Tensor) -> Tensor:
        return run_blocks(decoder, change(run_blocks(decoder, hidden, (0, 1))), (2,))

    assert "what enters block 2 is not the very tensor that left block 1" in reason(llama(between))


def test_what_a_block_hands_on_beside_the_hidden_state_is_refused() -> None:
    def hands_on(decoder: Any, hidden: Tensor) -> Tensor:
        first = run_block(decoder, 0, hidden, earlier=hidden)
        return run_blocks(decoder, run_block(decoder, 1, first, earlier=hidden), (2,), earlier=first)

    assert "block 2 receives another earlier where the blocks before it run" in reason(llama(hands_on))


def with_block(
    change: Callable[[Any, Tensor, dict[str, Any]], Tensor], forward: Pass = run_blocks, *, which: int
) -> Any:
    """A model in which `change(block, hidden, arguments)` is done to what enters one of the blocks."""
    model = llama(forward)
    block = model.model.layers[which]
    own = block.forward
    block.forward = lambda hidden, **arguments: own(change(block, hidden, arguments), **arguments)
    return model


def test_blocks_that_write_to_what_they_receive_are_refused() -> None:
    writes = with_block(lambda _block, hidden, _: hidden.mul_(1.001), which=1)
    assert "block 1 writes to the tensor that it receives" in reason(writes)

    def adds(_block: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        arguments["counter"].add_(1)
        return hidden

    def counted(decoder: Any, hidden: Tensor) -> Tensor:
        return run_blocks(decoder, hidden, counter=torch.zeros(()))

    assert "block 1 writes to its argument counter" in reason(with_block(adds, counted, which=1))

    def totals(decoder: Any, hidden: Tensor) -> Tensor:
        return run_blocks(decoder, hidden, counter={"total": torch.zeros(len(hidden))})

    def adds_inside(_block: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        arguments["counter"]["total"].add_(1)
        return hidden

    assert "block 1 writes to its argument counter" in reason(with_block(adds_inside, totals, which=1))

    def keeps(_block: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        arguments["notes"].kept = hidden
        return hidden

    def noted(decoder: Any, hidden: Tensor) -> Tensor:
        return run_blocks(decoder, hidden, notes=SimpleNamespace(kept=None))

    assert "block 1 writes to its argument notes" in reason(with_block(keeps, noted, which=1))


def test_what_is_kept_in_a_module_for_a_later_block_is_refused() -> None:
    kept: list[Tensor] = []
    model = with_block(lambda _block, hidden, _: kept.append(hidden) or hidden, which=0)
    last = model.model.layers[2]
    own = last.forward
    last.forward = lambda hidden, **arguments: own(hidden + kept[-1], **arguments)
    assert "cannot be taken through its decoder blocks one by one" in reason(model)


def test_what_is_added_behind_the_last_block_must_not_depend_on_the_text() -> None:
    assert "depend on the batch size" in reason(llama(lambda decoder, hidden: run_blocks(decoder, hidden) + hidden))


def test_a_model_that_looks_ahead_is_refused() -> None:
    def looks_ahead(decoder: Any, hidden: Tensor) -> Tensor:
        return run_blocks(decoder, hidden, attention_mask=torch.zeros(1, 1, hidden.shape[1], hidden.shape[1]))

    assert "a token changes the predictions of tokens before it" in reason(llama(looks_ahead))


@pytest.mark.parametrize("name", ["Bert", "Roberta", "XLMRoberta"])
def test_encoders_are_walked_as_decoders_only(name: str) -> None:
    config = getattr(transformers, f"{name}Config")
    sizes: dict[str, Any] = dict(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder, encoder = (AutoModelForCausalLM.from_config(config(**sizes, is_decoder=d)).eval() for d in (True, False))
    assert check_walk(InMemoryModel(decoder), random_ids(4)).same_batch == 0
    assert "set is_decoder=true in config.json" in reason(encoder)


def test_errors_of_a_model_are_sentences_too() -> None:
    def fails(_decoder: Any, _hidden: Tensor) -> Tensor:
        raise IndexError("list index out of range")

    assert "cannot be run one after the other (list index out of range)" in reason(llama(fails))


def test_the_rounding_in_words() -> None:
    assert str(Rounding(0, 0, 1e-4)) == "bit for bit"
    assert (
        str(Rounding(0, 2.1e-7, 1e-4)) == "bit for bit in the same batches, within 2e-07 of the largest logit in others"
    )
