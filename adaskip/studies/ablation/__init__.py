"""Single parts of AdaSkip switched on and off, and varied: online learning, compensation."""
