"""Variants of the three stages, compared over seeds on tasks of minutes."""
