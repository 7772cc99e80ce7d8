"""End to end, SmolLM2, Early Exit."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="e2e", model="smollm2", strategy="early_exit")
