"""One script per published claim: `python -m benchmarks.digits`, and so on. Results are in `benchmarks/results`."""
