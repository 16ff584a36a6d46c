"""The protocol that merges and unmerges: arm, drain, look, gate, with its preparation."""
