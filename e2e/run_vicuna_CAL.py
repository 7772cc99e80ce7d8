"""End to end, Vicuna, Calibrated."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="e2e", model="vicuna", strategy="calibrated")
