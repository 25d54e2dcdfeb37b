"""Slow proofs: what a claim of the README costs or gains, measured on the machine at hand."""
