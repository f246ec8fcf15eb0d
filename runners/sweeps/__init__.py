"""Many runs: each in a process of its own, one GPU each, and how far a study has come."""
