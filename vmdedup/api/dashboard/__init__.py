"""The dashboard: a page that shows what the daemon knows, and changes nothing.

`document` makes the figures out of the engine's last snapshot, `routes` serves
them with the page, its scripts and Plotly's, `headers` says what browsers may do
with them. The page itself is in `assets/`.
"""
