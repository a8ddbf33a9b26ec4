"""Which sample comes where in which step: pure, free of torch."""
