"""One pass of all calibration forwards over all layers, in lockstep and in execution order."""
