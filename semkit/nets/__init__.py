"""Nets: models by name, the engine that runs them, batch-norm folding, noise in weights."""
