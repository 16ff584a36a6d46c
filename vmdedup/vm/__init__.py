"""One attached VM, and the looks at its pages."""
