"""What is kept of a run: training states, complete or invisible."""
