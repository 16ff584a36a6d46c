"""Messages between the engine's process and the API's process."""
