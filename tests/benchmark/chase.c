/*
 * Reads all over some memory: what one read costs depends on how that is mapped.
 *
 * Each place follows from the word read before, so that no two reads overlap.
 */
#include <stdint.h>

enum { PAGE_WORDS = 512 };

uint64_t chase(const volatile uint64_t *words, uint64_t pages, uint64_t reads)
{
    uint32_t random = 1;
    uint64_t word = 0;
    for (uint64_t i = 0; i < reads; i++) {
        random = random * 1664525u + 1013904223u;
        word = words[((random * pages) >> 32) * PAGE_WORDS + word % PAGE_WORDS];
    }
    return word;
}
