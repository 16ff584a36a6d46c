"""What was saved when: a bounded time series that outlives the daemon.

    place      the state directory: where it is, who may have it
    series     samples, and how they are averaged into fewer (pure)
    database   the SQLite file: two tiers of rows, each bounded
    keeper     the file through its troubles: full, read-only, damaged, taken

The API server's process writes it. The engine, in which a gate may be closed,
has neither SQLite nor a file of it: it pushes its state as ever, and a disk that
is slow or full delays nobody but who reads the history.
"""
