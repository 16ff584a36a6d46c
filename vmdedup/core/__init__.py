"""The pure middle: digests, columns, trees, scan, plan, counters, census.

Owns every decision about which page may share with which, and no resource:
values in, values out, numpy columns throughout. Imports neither os nor asyncio
nor a clock, so that a pass can be replayed, printed and tested without a VM.

Words used by all of it: a *page index* (int64) counts pages in one VM's page
space, which is its mergeable regions laid end to end; a *site* is one (vm, page
index); a *slot* (int32) is one page of a stable store.
"""
