"""Small programs that run in the host, from /payload/inside; each needs little to start."""
