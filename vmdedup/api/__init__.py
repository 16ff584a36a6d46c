"""The API server: a process beside the engine that holds no userfaultfd."""
