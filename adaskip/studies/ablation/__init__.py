"""Ablations of parts of AdaSkip: online learning, compensation."""
