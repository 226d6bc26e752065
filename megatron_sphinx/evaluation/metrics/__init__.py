"""How answers are judged and figures made of it, to the letter of each benchmark's own scorer: one file a family."""
