"""The Linux kernel, one module for each of its interfaces: /proc, /sys, system calls.

Values and errors, no decisions: nothing here knows QEMU or merging. What is read is read
again when asked, never cached, because the process that it speaks of keeps running.
"""
