"""The guardian process, its stop notes, and the runtime directory.

Imports nothing: the guardian starts with as little as it can.
"""
