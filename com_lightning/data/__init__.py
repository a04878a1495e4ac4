"""The tasks' data: the calibration samples drawn from them, and the user's own steps run on these."""
