"""End to end, LLaMA, Calibrated."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="e2e", model="llama", strategy="calibrated")
