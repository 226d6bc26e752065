"""A training run, from its start-up to its exit status."""
