"""Runs: from a line of options to a folder of records, one cell or the whole grid, stopped and continued at will."""
