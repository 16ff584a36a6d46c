"""Guest pages seen from outside: where they are, what they hold, and what maps them."""
