"""Prefill phase, SmolLM2, Calibrated."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="prefill", model="smollm2", strategy="calibrated")
