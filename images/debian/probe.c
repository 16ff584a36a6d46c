/*
 * The probe of the Debian guest: how fast memory work goes, as the guest sees it.
 *
 * Its area is equal in all guests, so a host that shares memory shares it. An
 * operation sums one page; every eighth also writes a word of a page in a small
 * window that moves on each second. Pages that the window leaves get their first
 * content back and can be shared again, so writes keep meeting shared pages. The
 * probe works BURST_MS of every PERIOD_MS, to leave the host's processors alone;
 * it counts the time of its bursts only. Each second a line:
 *
 *     vmdedup-guest: ops=N busy_us=N
 *
 * It ends up as pid 1: it never ends, and its children are reaped by the kernel.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE_WORDS = 512, PAGES = 2048, WINDOW = 64, BURST_MS = 10, PERIOD_MS = 50 };

static uint64_t (*area)[PAGE_WORDS];

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static uint64_t first_word(uint64_t page)
{
    return (page + 1) * 0x9e3779b97f4a7c15u;
}

static uint64_t sum(uint64_t page)
{
    uint64_t total = 0;
    for (int word = 0; word < PAGE_WORDS; word++)
        total += area[page][word];
    return total;
}

int main(int count, char **words)
{
    signal(SIGCHLD, SIG_IGN);
    area = mmap(NULL, sizeof(*area) * PAGES, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED) {
        puts("vmdedup-guest: failed: no memory for the probe");
        return 1;
    }
    for (uint64_t page = 0; page < PAGES; page++)
        for (uint64_t word = 0; word < PAGE_WORDS; word++)
            area[page][word] = first_word(page) + word;
    printf("vmdedup-guest: ready workload=%s\n", count > 1 ? words[1] : "none");
    fflush(stdout);
    uint64_t ops = 0, busy_us = 0, window = 0, random = 1, kept = 0;
    uint64_t second = now_us();
    for (;;) {
        uint64_t begin = now_us(), now = begin;
        while (now - begin < BURST_MS * 1000) {
            for (int i = 0; i < 16; i++, ops++) {
                random = random * 6364136223846793005u + 1442695040888963407u;
                kept += sum((random >> 33) % PAGES);
                if (i % 8 == 0)
                    area[(window + (random >> 20) % WINDOW) % PAGES][1] = random;
            }
            now = now_us();
        }
        busy_us += now - begin;
        if (now - second >= 1000000) {
            second = now;
            for (uint64_t page = window; page < window + WINDOW; page++)
                area[page % PAGES][1] = first_word(page % PAGES) + 1;
            window = (window + WINDOW) % PAGES;
            printf("vmdedup-guest: ops=%llu busy_us=%llu%s\n", (unsigned long long)ops,
                   (unsigned long long)busy_us, kept ? "" : " ");
            fflush(stdout);
        }
        struct timespec rest = {0, (PERIOD_MS - BURST_MS) * 1000000};
        nanosleep(&rest, NULL);
    }
}
