"""`vmdedup bench`: vmdedup and the kernel's KSM on the same guests, in one run.

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

Nothing here is imported by the engine.
"""
