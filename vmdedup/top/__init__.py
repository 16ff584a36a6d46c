"""`vmdedup top`: the daemon's VMs in a terminal, live or from its history.

`view` is what the screen shows. `sample` makes it from two looks at the daemon, `replay`
from the history's samples; both need no terminal. `app` is the screen, with textual
(extra `top`).
"""
