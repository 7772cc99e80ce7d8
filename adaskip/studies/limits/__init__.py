"""The limit of the hardware beside what was measured and what the paper reports."""
