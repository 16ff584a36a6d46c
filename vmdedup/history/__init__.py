"""The savings over time: a bounded series of samples that outlives the daemon.

    place      the state directory: where it is, and its one holder
    series     samples, and how they are averaged into fewer (pure)
    database   the SQLite file: two tiers of rows, each bounded
    keeper     the file through its troubles: full, read-only, damaged, taken

The API server's process writes it. The engine, in which a gate may be closed,
has neither SQLite nor a file of it: it only pushes its state, and a slow or full
disk delays only those who read the history.
"""
