"""Injection on real victim processes."""
