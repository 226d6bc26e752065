"""The commands of `megatron-sphinx prepare`: each makes one kind of data ready, without a GPU or ranks."""
