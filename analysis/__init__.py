"""From `results/` to tables. Reads files only: needs pandas, and neither torch nor a model."""
