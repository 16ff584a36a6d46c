"""The service: the engine's API, served by a process of its own.

    engine process                      API server process
    launch ── starts, lends sockets ──▸ server ── http ──▸ client, curl, Prometheus
    channel.EngineChannel ◂─ frames ──▸ channel.ServerChannel

Reads are answered from the last snapshot that the engine pushed; only changes
travel to the engine. `protocol` has the shapes, `metrics` the Prometheus text.
"""
