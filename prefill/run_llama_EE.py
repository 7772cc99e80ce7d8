"""Prefill phase, LLaMA, Early Exit."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="prefill", model="llama", strategy="early_exit")
