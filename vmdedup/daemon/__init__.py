"""The engine's process as a service: its loop, its steering, its snapshots.

    engine process                          API server process
    api_process ── starts, lends sockets ─▸ api.server ── api.http ─▸ client, curl, Prometheus
    ipc.channel.EngineChannel ◂─ frames ──▸ ipc.channel.ServerChannel

`daemon` composes the engine's process; its head names the module of each part. Reads are
answered from the last snapshot that the engine pushed; only changes travel to the engine.
`ipc.protocol` has the shapes, `api.metrics` the Prometheus text.
"""
