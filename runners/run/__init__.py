"""One run, from preflight to its metrics, and the keys of everything that its numbers depend on."""
