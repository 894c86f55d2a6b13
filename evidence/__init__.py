"""Experiments behind what the README claims, each with its results."""
