"""What the columns of a class score mean, and which category is which of another data set."""
