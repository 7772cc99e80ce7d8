"""What every other package may use: options, files, locks, provenance, the guarded command."""
