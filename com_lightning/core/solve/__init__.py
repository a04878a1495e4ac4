"""The closed form of one layer: statistics of its inputs, and the solvers."""
