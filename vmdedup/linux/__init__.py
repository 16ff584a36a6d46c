"""The Linux kernel, one module for each of its interfaces: /proc, /sys, system calls.

Values and errors, no decisions: nothing here knows QEMU or merging. Each question is read
from the kernel again, never cached, because the process that it concerns keeps running.
"""
