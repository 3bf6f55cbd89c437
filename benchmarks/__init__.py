"""Benchmarks beside the peers; README.md says how to run them."""
