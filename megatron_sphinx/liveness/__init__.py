"""Which ranks are alive, how far each is, and why a run stops."""
