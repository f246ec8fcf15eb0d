"""What became of the layers of a run: one record each, and what they come to."""

from dataclasses import asdict, dataclass
from typing import Any

from runners.errors import InputError


@dataclass(frozen=True)
class LayerRecord:
    """What became of one linear layer: a row of `layers.csv`.

    Attributes:
        relative_error: ||W X - W_hat X||^2 / ||W X||^2, of W_hat as it stands in the model.
        seconds: spent in the solver.
        outlier_ratio: the share of the weights that are kept in 16 bits.
        damping: what was really added to the Hessian's diagonal, as a fraction of its mean; None: nothing.
        damping_raised: because the factorization failed with what was asked for.
        dead_columns: inputs that are zero in all of the calibration data.
        clipped_scales: scales that are as small as their format goes.
        non_finite: activations or the solver's weights were not finite.
        left_alone: the layer keeps its weights; `notes` says why.
        held_out_error: the relative error on calibration sequences that the solver has not seen; None: there were none.
        history: relative error after each sweep, of a method that was told to track it (`sweeps.csv`).
    """

    block: int
    layer: str
    out_features: int
    in_features: int
    relative_error: float = 0.0
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
    history: tuple[float, ...] = ()

    @property
    def row(self) -> dict[str, Any]:
        """The record as a row of `layers.csv`."""
        return {name: value for name, value in asdict(self).items() if name != "history"}


WARNINGS = ("damping_raised", "dead_columns", "clipped_scales", "non_finite", "left_alone")  # fields of a record


def refuse_warnings(record: LayerRecord) -> None:
    """What `warnings=error` does with a layer for which something did not go as asked.

    Raises:
        InputError: naming the layer and what it was.
    """
    if found := [f"{kind.replace('_', ' ')}: {value}" for kind in WARNINGS if (value := getattr(record, kind))]:
        what = ", ".join(found) + (f" ({record.notes})" if record.notes else "")
        raise InputError(f"{record.layer} in block {record.block}: {what}; warnings=record goes on and records it")


def summary(records: list[LayerRecord], parameters: int, stored_bits: float) -> dict[str, float]:
    """What the records of all layers come to, as it stands in `metrics.json`.

    Args:
        parameters: of the whole model, embeddings and head included, tied ones once.
        stored_bits: of those that are not in a quantized layer.
    """
    sizes = [record.out_features * record.in_features for record in records]
    quantized = sum(sizes)
    bits = sum(size * record.bits_per_weight for size, record in zip(sizes, records, strict=True))
    outliers = sum(size * record.outlier_ratio for size, record in zip(sizes, records, strict=True))
    solved = [record for record in records if not record.left_alone]
    held_out = [record.held_out_error for record in solved if record.held_out_error is not None]
    figures: dict[str, float] = {
        "bits_per_weight": bits / quantized,
        "bits_per_parameter": (bits + (parameters - quantized) * stored_bits) / parameters,
        "outlier_ratio": outliers / quantized,
        "layers/mean_relative_error": sum(record.relative_error for record in solved) / max(1, len(solved)),
        "layers/count": len(records),
    }
    if held_out:
        figures["layers/mean_held_out_error"] = sum(held_out) / len(held_out)
    return figures | {f"warnings/{kind}": sum(int(getattr(record, kind)) for record in records) for kind in WARNINGS}
