"""Which VMs may be merged, with which others, and how.

Owns the one table of hazards and the trust domains. Decides; changes nothing.
"""
