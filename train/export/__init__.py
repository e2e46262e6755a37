"""Trained networks for other frameworks: one module a format, each written with a card that says how to load it."""
