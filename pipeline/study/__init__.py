"""Studies of the supplement: each a table and a plot on one page, with its figures beside it."""
