"""`python -m analysis [STUDY ...]`: the tables of studies in results/, in Markdown."""

import sys
from pathlib import Path

from analysis.collect import collect
from analysis.tables import comparison, markdown


def main(studies: list[str]) -> None:
    """Print the table of each study."""
    for study in studies or ["tiny"]:
        folder = Path(study) if Path(study).is_dir() else Path("results") / study
        try:
            print(markdown(comparison(collect(folder))))
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
