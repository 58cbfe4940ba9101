"""Protections: what an owner does to images before publishing them."""
