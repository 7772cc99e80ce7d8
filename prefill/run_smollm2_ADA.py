"""Prefill phase, SmolLM2, AdaSkip."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="prefill", model="smollm2", strategy="adaskip")
