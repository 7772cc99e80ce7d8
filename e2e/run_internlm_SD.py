"""End to end, InternLM, SkipDecode."""

from adaskip.cli import run_cell

if __name__ == "__main__":
    run_cell(phase="e2e", model="internlm", strategy="skipdecode")
