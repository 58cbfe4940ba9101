"""How fast the engine is against the plain way of doing the same."""
