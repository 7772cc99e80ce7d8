"""End to end, SmolLM2, Unified Skipping."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="e2e", model="smollm2", strategy="unified")
