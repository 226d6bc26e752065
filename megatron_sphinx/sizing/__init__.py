"""What a configuration means before anything is started: sizes, the composition of steps, layouts, memory and time."""
