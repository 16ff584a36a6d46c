"""The protocol that merges and unmerges: arm, drain, look, gate, and what stands around it."""
