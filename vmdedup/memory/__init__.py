"""Guest memory from the outside: reading it, protecting it, and the store it shares.

Each module wraps one family of system calls and decides nothing.
"""
