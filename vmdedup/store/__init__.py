"""The files that hold the shared pages."""
