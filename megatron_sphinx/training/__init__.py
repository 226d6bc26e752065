"""How weights change: DeepSpeed ZeRO-2, the step, the loop and what it reports."""
