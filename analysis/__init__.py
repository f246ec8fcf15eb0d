"""From `results/` to tables and figures. Reads files only: needs pandas and matplotlib, and neither torch nor a model."""
