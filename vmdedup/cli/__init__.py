"""The command line: one thin module for each verb over `vmdedup.deduplicator`.

`main` alone makes exit codes. Heavy modules (numpy, pydantic, rich) are
imported inside the verbs that need them.
"""
