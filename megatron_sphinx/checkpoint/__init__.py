"""Training states that are complete or invisible; checkpoints of other software, read, written and mixed."""
