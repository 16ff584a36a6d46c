"""Kills and hangs of the engine and of VMs, and what they leave."""
