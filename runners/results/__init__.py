"""What a run leaves: metrics, per-layer results, the run's folder, progress, and the tables in the terminal."""
