"""Decode phase, SmolLM2, SkipDecode."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="decode", model="smollm2", strategy="skipdecode")
