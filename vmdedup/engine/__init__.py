"""The order of the stages over all VMs, and the list of those VMs."""
