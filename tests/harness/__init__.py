"""Boots the test guests and reads what they say, for tests and for the demo.

    images.py        the built guests
    disk.py          a disk whose every block is known
    serial.py        a guest's lines and commands
    vm.py            one QEMU, from start to removal
    capabilities.py  what this machine can run

Each imports only from those above it; content.py says what the guests write.
"""
