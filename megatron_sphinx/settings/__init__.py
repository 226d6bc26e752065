"""What the configuration files of checkpoints may say: for each format a table of its keys, with its defaults."""
