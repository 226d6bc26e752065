"""The commands of `megatron-sphinx cascade`: each asks about a picture, and hands on what was answered."""
