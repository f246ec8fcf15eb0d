"""What a run is told: the composed configuration, checked and turned into settings."""
