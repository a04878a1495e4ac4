"""Before and beside a merge: how far apart experts are, and several rules side by side."""
