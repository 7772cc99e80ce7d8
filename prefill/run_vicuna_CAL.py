"""Prefill phase, Vicuna, Calibrated."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="prefill", model="vicuna", strategy="calibrated")
