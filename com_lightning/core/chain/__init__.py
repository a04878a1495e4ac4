"""The chain of merges: what a sweep gathers at each layer, what is solved from it, and what is measured on the way."""
