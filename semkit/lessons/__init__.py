"""Lessons: the science, drawings, checkers and panels of each notebook."""
