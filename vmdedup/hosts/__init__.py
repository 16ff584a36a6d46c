"""Several hosts as one: what they share, which VMs are alike, where VMs should run.

The coordinator of `vmdedup fleet`. It asks the daemons of many hosts through `client`, and runs on
none of them: neither engine nor daemon imports it. (`engine/fleet.py` is another thing: the
VMs of one engine.)

    inventory  which hosts            sketch_table  sketches as Arrow, Parquet, SQL
    ask        their answers          alike         which VMs are alike
    documents  what is printed        placement     where VMs should run

It recommends, and never starts or moves a VM.
"""
