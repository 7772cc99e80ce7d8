"""What was measured of a model and the sets chosen from it: data, saved and loaded."""
