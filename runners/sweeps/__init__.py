"""Sweeps: a process and a GPU for each cell, and the status of every cell of a study."""
