"""Reports for people: tables on stdout, a progress line on stderr.

`words` has numbers and sizes as text. `progress` needs no rich, because it lives in the
engine's process. `console`, `table` and `text` are imported only to print a table.
"""
