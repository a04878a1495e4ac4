"""The closed form of one layer: statistics of its inputs, and what they are solved for."""
