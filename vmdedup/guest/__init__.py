"""Guest pages seen from outside: their addresses, their contents, and their mappings."""
