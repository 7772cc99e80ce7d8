"""Prefill phase, LLaMA, Calibrated."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="prefill", model="llama", strategy="calibrated")
