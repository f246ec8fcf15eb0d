"""The kinds of grid, one file each; what they have in common is `quantease.grid`."""
