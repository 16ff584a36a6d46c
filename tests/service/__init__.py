"""The API server process over its real socket, with a scripted engine behind it."""
