"""`python -m analysis [STUDY] [COLUMN=VALUE ...]`: the table of a study in results/, in Markdown.

COLUMN=VALUE keeps the runs with that value, and the unquantized ones: python -m analysis tiny bits=3
"""

import sys
from pathlib import Path

from analysis.collect import collect, keep
from analysis.tables import comparison, counts, markdown


def main(arguments: list[str]) -> None:
    """Print the table of one study."""
    conditions = [argument.partition("=") for argument in arguments if "=" in argument]
    studies = [argument for argument in arguments if "=" not in argument] or ["tiny"]
    if len(studies) > 1:
        raise SystemExit(f"error: one study at a time, not {', '.join(studies)}")
    folder = Path(studies[0]) if Path(studies[0]).is_dir() else Path("results") / studies[0]
    try:
        frame = collect(folder)
        for column, _, value in conditions:
            frame = keep(frame, column, value)
        print(markdown(comparison(frame)))
        if set(frame["status"]) != {"done"}:
            print(f"\nOf {len(frame)} runs: {counts(frame)}. The table shows those that are done.")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
