"""Running system calls inside another process so that a kill never harms it.

Owns ptrace, registers and the scratch memory inside the target. The only entry
is `remote.RemoteThread`. The modules, each using only those before it:
`x86_64` (registers, signal frames: pure), `stub` (machine code: pure), `threads` (a thread's
state in /proc), `table` (the shared table), `ptrace`, `remote`, `in_place`.
"""
