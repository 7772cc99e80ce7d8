"""Finds and loads models: registry, checkpoints, tokenizers, chat wrappers, and code for single architectures."""
