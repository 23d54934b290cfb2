"""Benchmarks, one file per question. Installed as flatops.benchmarks and run by `flatops bench`."""
