"""Who may be merged, with whom, and how.

Owns the one table of hazards and the trust domains. Decides; changes nothing.
"""
