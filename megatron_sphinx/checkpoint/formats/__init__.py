"""The formats of checkpoints: each a table of rules, how to recognise it, and the files it is made of."""
