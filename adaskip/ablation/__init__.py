"""Online learning switched on and off, and varied: what it gains and what it costs."""
