"""The commands of `megatron-sphinx`, a module each, which import what takes time only once they run."""
