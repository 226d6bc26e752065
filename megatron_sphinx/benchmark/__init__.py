"""Measured runs of `train`: what each rank sees, sweeps over keys, reports, and scaling over several of them."""
