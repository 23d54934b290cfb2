"""Benchmarks: one file per question; installed as flatops.benchmarks, run by `flatops bench`."""
