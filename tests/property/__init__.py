"""The core against naive models: properties that hold for every input."""
