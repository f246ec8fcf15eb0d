"""Making room: what of a study can go, and its removal."""
