"""Layouts of rows: packed sequences and common prompts, and whether a model takes them."""
