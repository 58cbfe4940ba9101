"""Countermeasures: what a trainer does about protected images."""
