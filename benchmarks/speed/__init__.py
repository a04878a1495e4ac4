"""How fast a merge is: against its floor, against its size, and against other libraries."""
