"""Benchmarks and demonstrations whose results are published in the README and in benchmarks/results."""
