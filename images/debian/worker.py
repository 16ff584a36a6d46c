"""The python workload: a table of records, some of them replaced 20 times a second."""

import time

RECORDS = 60_000
REPLACED = 100


def record(number, generation):
    return {"id": number, "generation": generation, "text": f"record {number} " * 4}


table = [record(number, 0) for number in range(RECORDS)]
with open("/run/worker-ready", "w"):
    pass
state = 1
generation = 0
while True:
    generation += 1
    for _ in range(REPLACED):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        table[(state >> 33) % RECORDS] = record(state >> 40, generation)
    time.sleep(0.05)
