"""Speed of SmolLM2: the full model and every strategy, side by side."""

from adaskip.cli import run_speed

if __name__ == "__main__":
    run_speed(model="smollm2")
