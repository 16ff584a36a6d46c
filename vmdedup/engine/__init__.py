"""The order of the stages over all VMs, and which VMs those are."""
