"""What the engine's process and the API's process say to each other."""
