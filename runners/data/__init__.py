"""Text: data sets, calibration sequences, evaluation windows and the questions of zero-shot tasks."""
