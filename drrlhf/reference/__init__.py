"""Every op in plain PyTorch, a file each: the definition, the oracle of the tests, the fallback."""
