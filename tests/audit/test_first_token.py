"""The output of a layer at the first position, looked at alone: against a model with a replaced weight."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from runners.arguments import invoke
from runners.audit.first_token import FirstToken, _first_restored, _logits, _weight, main
from runners.errors import InputError
from tests.families import random_ids, random_model

OPTIONS = ("calibration.num_sequences=4", "calibration.held_out=2", "evaluation=stdlib_docs", "bits=2", "windows=1")


def test_restoring_the_first_position_alone(tmp_path: Path) -> None:
    """Against float64 sums, with the layer's output put together by hand; afterwards the model is as it was."""
    model, ids = random_model("llama"), random_ids(2)
    module = model.model.layers[1].self_attn.v_proj
    original = module.weight.detach().clone()
    weight = original + 0.3 * torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        look = FirstToken(model, ids, _logits(model, ids))
        seen: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        model(ids)
        handle.remove()
        (x,) = seen
        mixed = torch.cat([x[:, :1] @ original.T, x[:, 1:] @ weight.T], 1)
        handle = module.register_forward_hook(lambda _module, _args, _output: mixed)
        expected = _kl(look.expected, model(ids).logits)
        handle.remove()
        with _weight(module, weight):
            changed = look._kl()
            with _first_restored(module, original):
                assert look._kl() == pytest.approx(expected, rel=1e-4)
            assert look._kl() == changed
        assert torch.equal(module.weight, original)
        assert abs(look._kl()) < 1e-7
    assert changed != pytest.approx(expected, rel=1e-3)


def _kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    p, q = (some[:, :-1].double().log_softmax(-1) for some in (reference, logits))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_the_command_writes_a_row_for_every_block_and_method(tmp_path: Path) -> None:
    file = tmp_path / "first.csv"
    invoke(["tiny", "blocks=0,2", "layer=self_attn.v_proj", f"to={file}", "methods=rtn,gptq", *OPTIONS], main)
    with file.open(encoding="utf-8") as opened:
        rows: list[dict[str, Any]] = list(csv.DictReader(opened))
    assert [(row["block"], row["method"]) for row in rows] == [("0", "rtn"), ("0", "gptq"), ("2", "rtn"), ("2", "gptq")]
    for row in rows:
        assert float(row["kl"]) > 0
        assert float(row["kl_first_restored"]) > 0
    rtn, gptq = rows[:2]
    assert rtn["output_first"] == gptq["output_first"]  # of the unquantized layer
    assert float(gptq["error_rest"]) < float(rtn["error_rest"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["blocks=9", "layer=fc1"], "there is no decoder block 9: the model has 4"),
        (["blocks=0", "layer=fc9"], "block 0 has no linear layer fc9: there are"),
        (["blocks=0", "layer=fc1", "methods=fp16"], "first_token needs methods that quantize"),
        (["blocks=0", "layer=fc1", "calibration.token_weights=length_one"], "token_weights=uniform only"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        invoke(["tiny", *words, f"to={tmp_path / 'first.csv'}", *OPTIONS], main)
    assert not list(tmp_path.iterdir())
