"""Figures of vmdedup: beside the kernel's KSM on the same guests, and some of its own.

`python -m tests.benchmark`, or `tox -e bench`, has both merge the same guests in one run:

    __main__      the command line
    guests        boots them, freezes them, hears their probes
    restoring     settings of the host, put back whatever happens
    ksm           KSM's settings in sysfs
    gauge         frames, PSS, processor time: the kernel's word on both
    contenders    KSM and vmdedup behind one set of verbs
    course        what each contender goes through
    results       figures of all, and the ratios
    table, plot   how they are shown
    simulate      the core alone, on synthetic digests
    budget        what is saved by how many VMAs, and what a VMA costs
    errors        why a measurement could not be done

Programs of their own, each run as `python -m tests.benchmark.NAME`:

    density       savings against huge pages kept, by the density from which they are split
    live_merge    the live merge on tiny guests, also as `tox -e benchmark`
    ways          what each second way of doing one thing gains
    serving       what serving reports does to gates
"""
