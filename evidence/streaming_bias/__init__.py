"""How far small batches fall short of the worst case of a population: see run.py."""
