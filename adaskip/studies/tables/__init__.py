"""Saved runs turned into scores, tables and a summary; nothing here runs a model."""
