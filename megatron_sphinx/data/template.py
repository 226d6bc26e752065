"""What the template of the released models says around every chat, in training and when a model is asked."""

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
STOP = "\n###"  # ends every turn; a generation ends where it comes
