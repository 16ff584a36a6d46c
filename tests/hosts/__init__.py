"""vmdedup on a host of its own: a Debian with systemd, in a VM, with bare VMs inside."""
