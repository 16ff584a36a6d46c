"""The dashboard: a page that shows the daemon's state, and changes nothing.

`document` makes the figures from the engine's last snapshot. `routes` serves them with the
page, its scripts and Plotly's. `headers` limits what browsers may do with them. The page
itself is in `assets/`.
"""
