"""Answers: a key-value cache, requests batched as they come, sampling, stopping, pictures, chat."""
