"""Benchmarks: what claims of the README cost or gain, measured on this machine."""
