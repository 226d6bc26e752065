"""Measured runs of `train`: what each rank observes, sweeps over keys, reports, and scaling over several of them."""
