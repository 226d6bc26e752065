"""Tensors in files: where each lies, and how files of several kinds are read and written a tensor at a time."""
