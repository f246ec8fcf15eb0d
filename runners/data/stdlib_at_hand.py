"""Importing this reads the texts of the standard library that runs measure and calibrate on, for processes forked later."""

from runners.data.stdlib import documents
from runners.errors import InputError

try:
    documents("docs", "evaluation")
    documents("docs", "calibration")
except InputError:  # the run that needs them says so
    pass
