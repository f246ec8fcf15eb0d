"""Every causal LM of the installed transformers, walked block by block and held against its own forward pass.

`python -m tests.family_table` writes the table into the README of `runners/models`; with names of families, their rows only.
"""

import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from runners.errors import InputError
from runners.models.activations import BlockActivations
from runners.models.checkpoint import Model, open_checkpoint
from runners.models.streaming import open_model
from runners.models.walk_check import check_walk
from tests.family_zoo import ALL_FAMILIES, VARIANTS, NotBuilt, small_model, token_ids

PROJECT = Path(__file__).parents[1]
README = PROJECT / "runners" / "models" / "README.md"
BEGIN, END = "<!-- table of families: python -m tests.family_table -->", "<!-- end of the table -->"
COUNT, LENGTH = 5, 24  # longer than the sliding windows
BATCH_SIZES = (2, 3)  # neither divides the count
# Of the largest logit, where the walk and the model add in another order: some units in the last place. Whether two sums of
# bfloat16 agree to the last bit depends on the processor and on where in memory the tensors begin.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MEMORY = 8 << 30  # bytes of a process that builds models: no mistake of a size shall take the machine along
LONGEST = 300  # characters of a reason
STATES = ("equal", "equal but for rounding", "refused", "different", "crashed", "not built")


@dataclass(frozen=True)
class Verdict:
    """What became of one variant of a family.

    Attributes:
        state: one of STATES.
        reason: the sentence of a refusal, an exception, or how large a difference is.
    """

    state: str
    reason: str = ""


def verdicts(family: str) -> dict[str, Verdict]:
    """Variant to verdict, for those variants that can be built; where none can, that is the verdict."""
    models, reasons = {}, []
    for variant in VARIANTS:
        try:
            models[variant] = small_model(family, variant)
        except NotBuilt as reason:
            reasons.append(str(reason))
    found = {variant: verdict(model) for variant, model in models.items()}
    return found or {VARIANTS[0]: Verdict("not built", reasons[0])}


def verdict(model: Any) -> Verdict:
    """Save, open, walk and compare a small model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(PROJECT / "runners" / "tiny" / file, folder)
        try:
            # eager: the faster forward passes of experts round in another way, which can send a token to another expert
            own: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager").eval()
        except Exception as error:
            return Verdict("not built", f"transformers does not load what it saved: {type(error).__name__}")
        try:
            return _compared(folder, own)
        except InputError as error:
            return Verdict("refused", _general(str(error), model, folder))
        except Exception as error:
            return Verdict("crashed", f"{type(error).__name__}: {_general(str(error), model, folder)}")


@torch.no_grad()
def _compared(folder: Path, model: Any) -> Verdict:
    """The walk of a checkpoint, held against `model`, which transformers has loaded from it."""
    ids = token_ids(COUNT, LENGTH)
    worst, rounding = 0.0, ROUNDING[next(model.parameters()).dtype]
    for batch_size in BATCH_SIZES:
        mine = walked_logits(folder, ids, batch_size).float()
        theirs = torch.cat([model(batch, use_cache=False).logits for batch in ids.split(batch_size)]).float()
        assert torch.isfinite(theirs).all(), "the model's own logits are not finite"
        if not torch.equal(mine, theirs):
            worst = max(worst, ((mine - theirs).abs().max() / theirs.abs().max()).nan_to_num(torch.inf).item())
    if worst == 0:
        return Verdict("equal")
    if worst <= rounding:
        return Verdict("equal but for rounding")
    return Verdict("different", f"by {worst:.0e} of the largest logit")


def walked_logits(folder: Path, ids: Tensor, batch_size: int) -> Tensor:
    """The logits (sequences, length, vocabulary) of a checkpoint that is opened and walked as a run does it."""
    model, device = Model("small", str(folder)), torch.device("cpu")
    source = open_model(open_checkpoint(model), model, device)
    check_walk(source, ids)
    walk = BlockActivations(source, ids, batch_size)
    for index in range(len(walk.blocks)):
        with source.open_block(index):
            walk.advance(index)
    return torch.cat([walk.logits(hidden) for hidden in walk.hidden])


def _general(sentence: str, model: Any, folder: Path) -> str:
    """A sentence without what differs between models: one row of the table is for all that have the same reason."""
    sentence = " ".join(sentence.split()).replace(str(folder), "FOLDER").replace(type(model).__name__, "MODEL")
    sentence = re.sub(r"\((\d+, )+\d+\)", "SHAPE", sentence)
    sentence = re.sub(r"(?<!not) \([^()]*(\([^()]*\)[^()]*)*\)", "", sentence)
    return re.sub(r"\d+", "N", sentence)[:LONGEST]


def named(family: str) -> dict[str, str]:
    """Verdict by name: the family's, or those of its variants where they differ."""
    answers = verdicts(family)
    names: dict[str, str] = {}
    for answer in dict.fromkeys(answers.values()):
        of = [variant for variant, other in answers.items() if other == answer]
        name = family if len(of) == len(answers) else f"{family} ({', '.join(of)})"
        names[name] = f"{answer.state}: {answer.reason}" if answer.reason else answer.state
    return names


def versions() -> str:
    """What the table is true of."""
    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def table(found: dict[str, str]) -> str:
    """Verdict by name as Markdown, one row for each verdict."""
    names: dict[str, list[str]] = {}
    for name, verdict in found.items():
        names.setdefault(verdict, []).append(name)
    order = sorted(names, key=lambda verdict: (STATES.index(verdict.split(":")[0]), -len(names[verdict])))
    lines = [f"With {versions()}:", "", "| verdict | families | names |", "|---|---:|---|"]
    lines += [f"| {verdict} | {len(names[verdict])} | {', '.join(sorted(names[verdict]))} |" for verdict in order]
    return "\n".join(lines)


def is_of_these_versions() -> bool:
    """Whether the committed table is of the installed torch and transformers."""
    return f"With {versions()}:" in README.read_text(encoding="utf-8")


def committed() -> dict[str, str]:
    """Verdict to names, as the committed table has them."""
    text = README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    return dict(re.findall(r"^\| (\w.*?) \| \d+ \| (.*) \|$", text, re.MULTILINE))


def committed_of(family: str) -> dict[str, str]:
    """Verdict by name, for the family or its variants."""
    each = {
        name: verdict for verdict, names in committed().items() for name in re.findall(r"[\w-]+(?: \(.*?\))?", names)
    }
    return {name: verdict for name, verdict in each.items() if name.split(" ")[0] == family}


@contextmanager
def limited() -> Iterator[None]:
    """One thread, no warnings of transformers, and an end to memory before the machine's."""
    threads, (soft, hard) = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_DATA)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not torch.cuda.is_available():  # whose driver reserves more than there is
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, hard))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def main(families: list[str]) -> None:
    """Write the rows of some families, or of all."""
    found: dict[str, str] = {}
    with limited():
        for family in families or ALL_FAMILIES:
            answers = named(family)
            print(*(f"{name}: {verdict}" for name, verdict in answers.items()), sep="\n", flush=True)
            found |= answers
    for family in set(ALL_FAMILIES) - set(families) if families else ():
        found |= committed_of(family)
    head, tail = README.read_text(encoding="utf-8").split(BEGIN)[0], README.read_text(encoding="utf-8").split(END)[1]
    README.write_text(f"{head}{BEGIN}\n{table(found)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
