"""VMs reached through libvirt."""
