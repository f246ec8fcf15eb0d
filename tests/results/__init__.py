"""Results on disk, and how damage to them is noticed."""
