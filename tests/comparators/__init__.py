"""Methods that QuantEase is compared with, beyond those of its paper, and what they need of the harness."""
