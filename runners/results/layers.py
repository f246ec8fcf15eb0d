"""Per-layer results and their whole-model summary."""

from dataclasses import asdict, dataclass
from typing import Any

from runners.errors import InputError
from runners.results import metrics


@dataclass(frozen=True)
class LayerRecord:
    """The result of one linear layer, or of another matrix in a decoder block: a row of `layers.csv`.

    Attributes:
        block: the index of its decoder block.
        layer: its name inside the block.
        out_features: rows of its weight matrix; of fused experts, of all of them together.
        in_features: columns of its weight matrix.
        relative_error: ||W X - W_hat X||^2 / ||W X||^2, of W_hat as the model stores it, on the calibration tokens as the
            solver was given them: with calibration.token_weights=length_one, each scaled to length one. None: without
            calibration there are none.
        seconds: spent in the solver.
        bits_per_weight: everything that must be stored for the layer, per weight.
        outlier_ratio: the share of the weights that are kept in 16 bits.
        damping: what was really added to the Hessian's diagonal, as a fraction of its mean; None: nothing.
        damping_raised: the Hessian could not be used with the damping that was asked for, so more was added.
        dead_columns: how many inputs are zero, or too small to be seen, in all of the calibration data.
        clipped_scales: how many scales are at the smallest value of their format.
        non_finite: activations or the solver's weights were not finite.
        left_alone: the layer keeps its weights; `notes` gives the reason.
        fallback: calibration gave the method too little to work with, so the layer took what `fallback` says; `notes` gives
            the reason. With `fallback=rtn` it is rounded to nearest, with `fallback=keep` left alone.
        tokens: how many calibration tokens have reached the layer: of an expert, those that were routed to it. None: no
            calibration, or a matrix that no method is given.
        notes: remarks of the solver, in words.
        bits, group_size, grid, symmetric: of the layer's own grid, `grid` by its name (`int`, `nf4`); None: it keeps its
            weights, or the result is older. `group_size` is None where a row shares one scale, too.
        worse_than_rounding: the held-out error exceeds that of rounding to nearest on the run's grid; `notes` gives both.
        held_out_error: the relative error on calibration sequences that the solver has not seen; None: there were none.
            Their tokens are never scaled, so it means the same in every run; likewise `token_error`.
        token_error: the mean over up to 2,048 held-out tokens x of ||(W - W_hat) x||^2 / ||W x||^2: each counts alike, where
            in `held_out_error` those with large inputs decide. None: there were no held-out sequences.
        energy_top_percent: the share of the energy ||x||^2 of the layer's input that 1 % of the calibration tokens have.
        energy_max_over_median: the largest energy of a token over that of the median token.
        energy_position: where in a sequence (from 0) its token of the largest energy is, most often; None where the layer's
            input has lost the order of the tokens, as that of an expert.
        energy_position_share: in how many of the sequences it is there, as a share.
        history: the relative error after each sweep, of a method with `track_objective` (`sweeps.csv`).
    """

    block: int
    layer: str
    out_features: int
    in_features: int
    relative_error: float | None = 0.0
    seconds: float = 0.0
    bits_per_weight: float = 0.0
    outlier_ratio: float = 0.0
    damping: float | None = None
    damping_raised: bool = False
    dead_columns: int = 0
    clipped_scales: int = 0
    non_finite: bool = False
    left_alone: bool = False
    notes: str = ""
    held_out_error: float | None = None
    worse_than_rounding: bool = False
    token_error: float | None = None
    energy_top_percent: float | None = None
    energy_max_over_median: float | None = None
    energy_position: int | None = None
    energy_position_share: float | None = None
    fallback: bool = False
    tokens: int | None = None
    bits: int | None = None
    group_size: int | None = None
    grid: str | None = None
    symmetric: bool | None = None
    history: tuple[float, ...] = ()

    @property
    def row(self) -> dict[str, Any]:
        """The record as a row of `layers.csv`."""
        return {name: value for name, value in asdict(self).items() if name != "history"}


ROUTER_NOTE = "a router of experts, which stays as it is"
SKIPPED_NOTE = "skipped, as layers asks for"

# Fields of a record.
WARNINGS = (
    "damping_raised",
    "dead_columns",
    "clipped_scales",
    "non_finite",
    "left_alone",
    "worse_than_rounding",
    "fallback",
)

ERRORS = {
    metrics.RELATIVE_ERROR: "relative_error",
    metrics.HELD_OUT_ERROR: "held_out_error",
    metrics.TOKEN_ERROR: "token_error",
}  # by the key of their mean over the layers


def refuse_warnings(record: LayerRecord) -> None:
    """Stop at a layer for which something did not go as asked: the setting `warnings=error`.

    Raises:
        InputError: with the layer and what happened to it.
    """
    if record.notes in (ROUTER_NOTE, SKIPPED_NOTE):  # it is meant to keep its weights
        return
    if found := [f"{kind.replace('_', ' ')}: {value}" for kind in WARNINGS if (value := getattr(record, kind))]:
        what = ", ".join(found) + (f" ({record.notes})" if record.notes else "")
        raise InputError(f"{record.layer} in block {record.block}: {what}; warnings=record goes on and records it")


# From this share of the energy on, the top 1 % of the tokens rule a layer: the other 99 % count for less than they do.
RULING_SHARE = 0.5


def ruled_by_few_tokens(records: list[LayerRecord]) -> str | None:
    """A sentence about the layers whose inputs belong to few tokens; None: there are no such layers."""
    ruled = [record for record in records if (record.energy_top_percent or 0) > RULING_SHARE]
    if not ruled:
        return None
    worst = max(ruled, key=lambda record: record.energy_top_percent or 0)
    others = f" and {len(ruled) - 1} more layers are" if len(ruled) > 1 else " is"
    place = (
        f", most often at position {worst.energy_position} of the window" if worst.energy_position is not None else ""
    )
    return (
        f"{worst.layer} in block {worst.block}{others} ruled by few tokens: 1 % of the calibration tokens have "
        f"{worst.energy_top_percent:.0%} of the energy of its input{place}. Its error tells little about the other tokens; "
        "calibration.token_weights=length_one weighs all alike"
    )


def mean_bits(records: list[LayerRecord]) -> float:
    """The bits of a code of the layers that are quantized, as a mean over their weights."""
    sizes = [(record.out_features * record.in_features, record.bits) for record in records]
    known = [(size, bits) for size, bits in sizes if bits is not None]
    return sum(size * bits for size, bits in known) / sum(size for size, _ in known)


def summarize_layers(records: list[LayerRecord], parameters: int, stored_bits: float) -> dict[str, float]:
    """The whole model's metrics from its layers' records.

    Bits and outliers are means over weights, so a large layer counts for more; errors are means over layers, as the paper
    plots them, and absent where no layer has any.

    Args:
        records: of all matrices in decoder blocks that the run has visited, those that it left alone included.
        parameters: of the whole model, embeddings and head included, tied ones once.
        stored_bits: of a parameter that is not in a quantized layer.
    """
    sizes = [record.out_features * record.in_features for record in records]
    quantized = sum(sizes)
    bits = sum(size * record.bits_per_weight for size, record in zip(sizes, records, strict=True))
    outliers = sum(size * record.outlier_ratio for size, record in zip(sizes, records, strict=True))
    solved = [record for record in records if not record.left_alone]  # the others have no error to speak of
    summary: dict[str, float] = {
        metrics.BITS_PER_WEIGHT: bits / quantized,
        metrics.BITS_PER_PARAMETER: (bits + (parameters - quantized) * stored_bits) / parameters,
        metrics.OUTLIER_RATIO: outliers / quantized,
        metrics.LAYER_COUNT: len(records),
    }
    if not solved:
        summary[metrics.RELATIVE_ERROR] = 0.0
    for key, name in ERRORS.items():
        if known := [error for record in solved if (error := getattr(record, name)) is not None]:
            summary[key] = sum(known) / len(known)
    return summary | {metrics.warning(kind): sum(int(getattr(record, kind)) for record in records) for kind in WARNINGS}
