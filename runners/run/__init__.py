"""One run from preflight to its results, and what its numbers depend on."""
