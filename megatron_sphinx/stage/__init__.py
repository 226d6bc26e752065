"""The encoder stage: frozen encoders on ranks of their own, running ahead of the language model."""
