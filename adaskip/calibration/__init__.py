"""Measures importance profiles, and searches the sets of sublayers whose skipping changes the output least."""
