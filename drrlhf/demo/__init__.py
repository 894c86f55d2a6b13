"""The demonstration: real human ratings, a small real encoder and a small real language model."""
