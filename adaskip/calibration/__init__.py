"""Measures importance profiles, and searches sets by what skipping them does to the output."""
