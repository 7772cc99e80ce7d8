"""Benchmark tasks: their files, prompts and scores."""
