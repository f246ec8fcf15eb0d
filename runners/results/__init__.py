"""The results of a run: its metrics, per-layer results, folder and progress, and the tables in the terminal."""
