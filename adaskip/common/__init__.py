"""Helpers that every other package may import: options, files, locks, provenance, error handling of commands."""
