"""Tests on real QEMU virtual machines."""
