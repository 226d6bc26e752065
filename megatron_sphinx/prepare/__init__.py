"""Data sets made offline from what people have: pairs, text, conversations, tasks."""
