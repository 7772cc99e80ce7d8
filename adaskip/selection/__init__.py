"""Sets of sublayers chosen by what skipping them does to the model's output."""
