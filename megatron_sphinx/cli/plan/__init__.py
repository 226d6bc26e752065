"""The commands of `megatron-sphinx plan`: what a run is and needs, before anything is queued."""
