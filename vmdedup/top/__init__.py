"""`vmdedup top`: the daemon's VMs in a terminal.

`view` is what the screen shows. `sample` makes it from two looks at the daemon, and needs
no terminal. `app` is the screen, with textual (extra `top`).
"""
