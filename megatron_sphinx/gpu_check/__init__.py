"""One command that says whether the package is right and fast on a GPU: measured here, beside bounds and a peer."""
