"""A soak: the daemon among VMs that come, go and change, for as long as it is told."""
