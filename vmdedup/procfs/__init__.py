"""What the kernel says about a process: its mappings, its pages, its identity.

Reads only. Everything here comes from /proc and is re-read when asked, never
cached, because the process it speaks of keeps running.
"""
