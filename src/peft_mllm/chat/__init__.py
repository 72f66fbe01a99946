"""Talking with a model: in the terminal, to a program, or on a page in the browser."""
