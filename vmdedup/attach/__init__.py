"""Reaching running VMs: their monitors, their processes, their guest RAM.

Owns everything that is asked of QEMU itself. Changes nothing in a VM except
through the commands that callers name (`stop`, `cont`, descriptor passing).
"""
