"""Profiles: measurements of a model, and sets of sublayers chosen from them, with save and load."""
