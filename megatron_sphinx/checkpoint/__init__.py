"""Training states, complete or invisible; and the checkpoints of others, read, written and mixed."""
