"""Readers of benchmarks as their authors distribute them: a usual layout is described, another has its own file."""
