"""Figures of saved results; nothing here runs a model or scores a sample."""
