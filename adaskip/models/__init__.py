"""Models by name: registry, checkpoints, tokenizers, chat wrappers, and what single architectures need."""
