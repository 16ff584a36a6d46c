"""`vmdedup top`: the daemon's VMs, live in a terminal.

`sample` turns two looks at the daemon into rates and rows and needs no
terminal; `app` shows them, with textual (extra `top`).
"""
