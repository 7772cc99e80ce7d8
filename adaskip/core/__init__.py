"""Skipping itself: plans, the patched forward, the state of one request, generation."""
