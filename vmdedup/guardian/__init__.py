"""The guardian process, its stop notes, and the runtime directory.

Imports nothing: the guardian process starts with as little memory as it can.
"""
