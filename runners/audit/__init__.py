"""`python -m runners.audit RUN`: which layers a quantized model's loss comes from."""
