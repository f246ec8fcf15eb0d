"""What must be said with the numbers of a table: the marks of its rows, and the notes below it."""

from analysis.series import Row, model_notes
from runners.results.metrics import (
    CALIBRATION_BOS,
    CALIBRATION_NOTE,
    FAR_MORE_BITS,
    FAR_MORE_NOTE,
    REFERENCE,
    fallback_note,
    stored_note,
    stores_far_more,
)

RAISED = " †"  # after the name of a method that had to raise its damping in some layer
RAISED_NOTE = "† damping was raised in some layers because the factorization failed: see their layers.csv"
CALIBRATED_WITH = "calibration.bos"  # the heading of a column, and the setting that explains it


def stored_words(row: Row, words: str) -> str:
    """Bits per weight in words, marked in front where they are far more than the bits of the row."""
    return f"{FAR_MORE_BITS} {words}" if stores_far_more(row) else words


def mark_notes(raised: bool, far_more: bool) -> list[str]:
    """The notes that explain the marks of a table's rows."""
    return [RAISED_NOTE] * raised + [f"{FAR_MORE_BITS} {FAR_MORE_NOTE}"] * far_more


def row_notes(rows: list[Row]) -> list[str]:
    """What must be said of the models and of the calibration of the rows."""
    elsewhere = dict.fromkeys(note for row in rows if (note := stored_note(row)))
    return [*model_notes(rows), *calibration_notes(rows), *fallback_notes(rows), *elsewhere]


def fallback_notes(rows: list[Row]) -> list[str]:
    """What must be said of layers that calibration reached too little, of each row that has some."""
    notes = [(f"{row['label']}, {row['grid']}", fallback_note(row)) for row in rows]
    return list(dict.fromkeys(f"{who}: {note}" for who, note in notes if note))


def calibration_notes(rows: list[Row]) -> list[str]:
    """What must be said of texts that were calibrated on, each with the methods that it concerns."""
    concerned: dict[str, set[str]] = {}
    for row in rows:
        if CALIBRATION_NOTE in row:
            concerned.setdefault(row[CALIBRATION_NOTE], set()).add(row["method"])
    return [f"{', '.join(sorted(methods))}: {note}" for note, methods in sorted(concerned.items())]


def bos_differs(rows: list[Row]) -> bool:
    """Whether rows of one model were calibrated with BOS at different places. Results older than the key do not tell."""
    found = {
        (row["model"], row[CALIBRATION_BOS]) for row in rows if CALIBRATION_BOS in row and row["method"] != REFERENCE
    }
    return len(found) > len({model for model, _ in found})


def bos_notes(rows: list[Row]) -> list[str]:
    """Which methods were calibrated with BOS where, if that is not the same for all of a model."""
    if not bos_differs(rows):
        return []
    concerned: dict[str, list[str]] = {}
    for row in rows:
        if CALIBRATION_BOS in row:
            concerned.setdefault(row[CALIBRATION_BOS], []).append(row["label"])
    parts = [f"{bos} for {', '.join(dict.fromkeys(labels))}" for bos, labels in concerned.items()]
    return [f"BOS in the calibration sequences ({CALIBRATED_WITH}): {'; '.join(parts)}"]
