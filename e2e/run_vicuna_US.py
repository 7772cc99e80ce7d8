"""End to end, Vicuna, Unified Skipping."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="e2e", model="vicuna", strategy="unified")
