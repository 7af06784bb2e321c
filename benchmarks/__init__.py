"""Benchmarks: `python -m benchmarks.run`. Not installed; they belong to a source checkout."""
