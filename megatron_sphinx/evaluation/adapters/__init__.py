"""Our models inside of other programs that evaluate: what these call, over the Python interface of a loaded model."""
