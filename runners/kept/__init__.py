"""A finished run that has kept its weights, opened again: its codes, its model, and the texts that it was measured on."""
