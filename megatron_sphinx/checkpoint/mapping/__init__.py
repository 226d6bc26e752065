"""What the tensors of a format mean: boxes of the weights of a whole model; and how some boxes become others."""
