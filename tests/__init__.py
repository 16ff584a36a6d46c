"""vmdedup's tests; suites stand in directories of their own."""
