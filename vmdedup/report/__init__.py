"""Reports for people: tables on stdout, a progress line on stderr.

`words` has numbers and sizes as text, `progress` needs no rich (it lives in the
engine's process), `console`, `table` and `text` are imported only when there is
a table to print.
"""
