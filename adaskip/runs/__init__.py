"""Runs of one cell or the whole grid: from command-line options to a folder of records; resumable at any point."""
