/*
 * The memory worker both test guests run: content, bookkeeping, checks.
 *
 * An area of guest pages holds four classes of content, so that a merger finds
 * every kind of page in it:
 *
 *   unique   content of this seed and page only
 *   shared   content of `common` and the page's rank in its class: equal in
 *            every guest with the same `common`, tiny or bare
 *   repeat   REPEATED contents of this seed, over and over within the guest
 *   zero     filled once, then zeroed
 *
 * The worker always knows what each word of the area must be. It rewrites pages
 * (whole, with new, zero or formerly held content, or one word only, so that a
 * lost neighbour of a written word is seen too), reads every rewritten page
 * back at once, and checks the whole area round and round. A page that is not
 * as written counts as one error, at every look.
 *
 * Freestanding: no libc, 32 and 64 bits alike. The includer provides
 * `void emit(const char *text)`, which writes text to the serial port.
 */
#ifndef VMDEDUP_WORKER_H
#define VMDEDUP_WORKER_H

#include <stdint.h>

enum { PAGE_BYTES = 4096, PAGE_WORDS = PAGE_BYTES / 8, REPEATED = 8, DETAILS = 8, SLICE = 8, STATUS_MS = 250 };
enum { ROAM_READS = 1 << 15 };
enum page_class { UNIQUE, SHARED, REPEAT, ZERO, CLASSES };
enum { DISK_BLOCK = 100, DMA_COMMON = 101 }; /* further kinds of content (tiny/dma.h) */

#define STEP 0x9e3779b97f4a7c15ull /* distance of neighbouring words of a page */
#define NO_PATCH 0xffff
#define NOT_GIVEN (~0ull)

static void emit(const char *text);

/* ---- lines on the serial port ---- */

struct line {
    char text[512];
    unsigned used;
};

static void put(struct line *line, const char *text)
{
    while (*text && line->used < sizeof line->text - 1)
        line->text[line->used++] = *text++;
    line->text[line->used] = 0;
}

static void put_hex(struct line *line, uint64_t value)
{
    char digits[17];
    for (int i = 15; i >= 0; i--, value >>= 4)
        digits[i] = "0123456789abcdef"[value & 15];
    digits[16] = 0;
    put(line, digits);
}

/* Decimal. 64-bit division is a library call on 32 bits: divide 32 bits by 10 in halves. */
static void put_dec(struct line *line, uint64_t value)
{
    char digits[21];
    int at = 20;
    digits[at] = 0;
    do {
        uint32_t high = (uint32_t)(value >> 32), low = (uint32_t)value;
        uint32_t rest = high % 10;
        uint32_t middle = (rest << 16) | (low >> 16);
        uint32_t bottom = ((middle % 10) << 16) | (low & 0xffff);
        value = ((uint64_t)(high / 10) << 32) + ((uint64_t)(middle / 10) << 16) + bottom / 10;
        digits[--at] = (char)('0' + bottom % 10);
    } while (value);
    put(line, digits + at);
}

static void put_field(struct line *line, const char *name, uint64_t value)
{
    put(line, " ");
    put(line, name);
    put(line, "=");
    put_dec(line, value);
}

static void begin(struct line *line, const char *text)
{
    line->used = 0;
    put(line, "vmdedup-guest:");
    put(line, text);
}

static void finish(struct line *line)
{
    put(line, "\n");
    emit(line->text);
}

/* ---- parameters: `vmdedup.NAME=NUMBER` on the command line ---- */

static uint64_t parameter(const char *cmdline, const char *name, uint64_t otherwise)
{
    static const char prefix[] = "vmdedup.";
    for (const char *at = cmdline; *at; at++) {
        const char *c = at, *want = prefix;
        if (at != cmdline && at[-1] != ' ')
            continue;
        while (*want && *c == *want)
            c++, want++;
        if (*want)
            continue;
        want = name;
        while (*want && *c == *want)
            c++, want++;
        if (*want || *c++ != '=')
            continue;
        uint64_t value = 0;
        while (*c >= '0' && *c <= '9')
            value = value * 10 + (uint64_t)(*c++ - '0');
        return value;
    }
    return otherwise;
}

/* ---- content ---- */

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t mix(uint64_t a, uint64_t b)
{
    uint64_t z = a * STEP + b + 1;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* A page's content follows from its key: word i is key + i * STEP; key 0 is the zero page. */
static uint64_t content_key(unsigned kind, uint64_t seed, uint64_t number)
{
    uint64_t key = mix(mix(kind, seed), number);
    return key ? key : 1;
}

static void fill(volatile uint64_t *page, uint64_t key)
{
    uint64_t word = key, step = key ? STEP : 0;
#define PUT *page++ = word; word += step;
    for (int i = 0; i < PAGE_WORDS; i += 8) {
        PUT PUT PUT PUT PUT PUT PUT PUT
    }
#undef PUT
}

/* ---- the area ---- */

struct page_state {
    uint64_t key;
    uint32_t rank;       /* position within its class */
    uint32_t generation; /* rewrites so far */
    uint16_t patch;      /* word that holds patch_word() instead, or NO_PATCH */
    uint16_t class;
};

struct worker {
    volatile uint64_t *area;
    struct page_state *state;
    uint32_t pages, cursor;
    uint64_t seed, common;
    uint32_t class_pages[CLASSES];
    uint64_t checks, rewrites, errors, passes;
    int held;
    int roams;
    uint32_t random, word;
    uint64_t reads;
    uint32_t rewrite_per_s, check_per_s, rewrite_s;
    uint32_t second_ms, second_checks, second_rewrites;
};

static uint64_t patch_word(const struct worker *w, uint32_t page)
{
    return ~mix(w->seed ^ page, w->state[page].generation);
}

static uint64_t base_key(const struct worker *w, uint32_t page)
{
    const struct page_state *s = &w->state[page];
    switch (s->class) {
    case UNIQUE:
        return content_key(UNIQUE, w->seed, s->rank);
    case SHARED:
        return content_key(SHARED, w->common, s->rank);
    case REPEAT:
        return content_key(REPEAT, w->seed, s->rank % REPEATED);
    default:
        return 0;
    }
}

/*
 * Deals classes out to blocks of `run_pages` pages: block b is looked up at
 * position b * stride modulo the number of blocks (stride and blocks coprime, so
 * every position comes once), which interleaves the classes and keeps the shares.
 */
static void deal_classes(struct worker *w, uint32_t run_pages)
{
    uint32_t blocks = (w->pages + run_pages - 1) / run_pages;
    uint32_t stride = blocks / 2 + blocks / 8 + 1, a, b;
    uint32_t rank[CLASSES] = {0};
    for (;; stride++) {
        for (a = stride, b = blocks; b;) {
            uint32_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1)
            break;
    }
    uint32_t position = 0;
    for (uint32_t page = 0; page < w->pages; page++) {
        if (page && page % run_pages == 0)
            position = (position + stride) % blocks;
        uint32_t place = position * run_pages, class = ZERO;
        for (uint32_t end = w->pages; class > UNIQUE; class--) {
            end -= w->class_pages[class];
            if (place >= end)
                break;
        }
        w->state[page].class = (uint16_t)class;
        w->state[page].rank = rank[class]++;
    }
    for (int class = 0; class < CLASSES; class++)
        w->class_pages[class] = rank[class];
}

/* First word from `at` on that is not as the key says, or `end`. Eight at a time: it is hot. */
static int first_wrong(volatile const uint64_t *words, uint64_t key, int at, int end)
{
    uint64_t step = key ? STEP : 0, word = key + (uint64_t)at * step;
#define LOOK if (words[at] != word) return at; at++, word += step;
    while (at + 8 <= end) {
        LOOK LOOK LOOK LOOK LOOK LOOK LOOK LOOK
    }
    while (at < end) {
        LOOK
    }
#undef LOOK
    return end;
}

static void tell_error(const struct worker *w, uint32_t page, int word, uint64_t want)
{
    struct line line;
    begin(&line, " error");
    put_field(&line, "page", page);
    put_field(&line, "word", (uint64_t)word);
    put_field(&line, "class", w->state[page].class);
    put_field(&line, "generation", w->state[page].generation);
    put(&line, " got=");
    put_hex(&line, w->area[(uint64_t)page * PAGE_WORDS + (uint64_t)word]);
    put(&line, " want=");
    put_hex(&line, want);
    finish(&line);
}

static void check_page(struct worker *w, uint32_t page)
{
    const struct page_state *s = &w->state[page];
    volatile const uint64_t *words = w->area + (uint64_t)page * PAGE_WORDS;
    int patch = s->patch == NO_PATCH ? PAGE_WORDS : s->patch;
    int wrong = first_wrong(words, s->key, 0, patch);
    uint64_t want = s->key ? s->key + (uint64_t)wrong * STEP : 0;
    if (wrong == patch && patch < PAGE_WORDS) {
        want = patch_word(w, page);
        if (words[patch] == want) {
            wrong = first_wrong(words, s->key, patch + 1, PAGE_WORDS);
            want = s->key ? s->key + (uint64_t)wrong * STEP : 0;
        }
    }
    if (wrong < PAGE_WORDS && w->errors++ < DETAILS)
        tell_error(w, page, wrong, want);
}

/* What a rewrite leaves follows from seed, page and generation only. */
static void rewrite_page(struct worker *w, uint32_t page)
{
    struct page_state *s = &w->state[page];
    volatile uint64_t *words = w->area + (uint64_t)page * PAGE_WORDS;
    s->generation++;
    uint64_t chance = mix(w->seed ^ 0x5eed, ((uint64_t)page << 32) | s->generation);
    if (s->patch == NO_PATCH && (chance & 1)) {
        s->patch = (uint16_t)((chance >> 8) % PAGE_WORDS);
        words[s->patch] = patch_word(w, page);
    } else {
        uint64_t other = (chance >> 8) & 0xffffffff;
        switch ((chance >> 1) & 3) {
        case 0:
            s->key = base_key(w, page);
            break;
        case 1:
            s->key = 0;
            break;
        case 2:
            s->key = content_key(SHARED, w->common, (uint32_t)other % (w->class_pages[SHARED] + 1));
            break;
        default:
            s->key = content_key(UNIQUE, w->seed ^ chance, other);
        }
        s->patch = NO_PATCH;
        fill(words, s->key);
    }
    w->rewrites++;
    check_page(w, page);
}

static uint64_t rotate(uint64_t value)
{
    return (value << 1) | (value >> 63);
}

/* Over what the memory holds, not over what it should hold. */
static uint64_t checksum(const struct worker *w)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < (uint64_t)w->pages * PAGE_WORDS; i++)
        sum = rotate(sum) ^ (w->area[i] * STEP);
    return mix(sum, w->pages);
}

/* Pages the area has with these parameters; what the includer must provide memory for. */
static uint32_t area_pages(const char *cmdline)
{
    return (uint32_t)parameter(cmdline, "mib", 16) * 256;
}

/* `area` and `state` have room for area_pages() pages. */
static void start_worker(struct worker *w, const char *cmdline, void *area, void *state)
{
    w->area = area;
    w->state = state;
    w->pages = area_pages(cmdline);
    w->seed = parameter(cmdline, "seed", 1);
    w->common = parameter(cmdline, "common", 1);
    uint32_t rest = w->pages;
    static const char *const names[CLASSES] = {"", "shared_mib", "repeat_mib", "zero_mib"};
    for (int class = SHARED; class < CLASSES; class++) {
        uint64_t mib = parameter(cmdline, names[class], NOT_GIVEN);
        uint32_t pages = mib == NOT_GIVEN ? w->pages / 4 : (uint32_t)mib * 256;
        w->class_pages[class] = pages < rest ? pages : rest;
        rest -= w->class_pages[class];
    }
    w->class_pages[UNIQUE] = rest;
    uint32_t run_pages = (uint32_t)parameter(cmdline, "run_pages", 16);
    deal_classes(w, run_pages ? run_pages : 1);
    for (uint32_t page = 0; page < w->pages; page++) {
        struct page_state *s = &w->state[page];
        s->generation = 0;
        s->patch = NO_PATCH;
        if (s->class == ZERO)
            fill(w->area + (uint64_t)page * PAGE_WORDS, content_key(UNIQUE, w->seed, ~0ull));
        s->key = base_key(w, page);
        fill(w->area + (uint64_t)page * PAGE_WORDS, s->key);
    }
    w->cursor = 0;
    w->checks = w->rewrites = w->errors = w->passes = 0;
    w->second_ms = w->second_checks = w->second_rewrites = 0;
    w->held = (int)parameter(cmdline, "hold", 0);
    w->roams = (int)parameter(cmdline, "roam", 0);
    w->random = 1;
    w->word = 0;
    w->reads = 0;
    w->rewrite_s = (uint32_t)parameter(cmdline, "rewrite_s", 0);
    w->rewrite_per_s = (uint32_t)parameter(cmdline, "rewrite_per_s", 64);
    w->check_per_s = (uint32_t)parameter(cmdline, "check_per_s", w->pages);
}

static void say_ready(const struct worker *w)
{
    struct line line;
    begin(&line, " ready");
    put_field(&line, "pages", w->pages);
    put_field(&line, "unique", w->class_pages[UNIQUE]);
    put_field(&line, "shared", w->class_pages[SHARED]);
    put_field(&line, "repeat", w->class_pages[REPEAT]);
    put_field(&line, "zero", w->class_pages[ZERO]);
    finish(&line);
}

static void begin_status(const struct worker *w, struct line *line)
{
    begin(line, "");
    put_field(line, "checks", w->checks);
    put_field(line, "rewrites", w->rewrites);
    put_field(line, "errors", w->errors);
    put_field(line, "passes", w->passes);
    put_field(line, "held", (uint64_t)w->held);
    if (w->roams)
        put_field(line, "reads", w->reads);
}

/* What is due after `passed_ms` of a second at `rate` a second. */
static uint32_t due(uint32_t rate, uint32_t passed_ms)
{
    return rate / 1000 * passed_ms + rate % 1000 * passed_ms / 1000;
}

/*
 * One small slice of what is due; 1 when more is due already. `now_ms` counts
 * from the start. What a second could not do is dropped at its end, so that a
 * slow or long paused guest does not run after its debts.
 */
static int work(struct worker *w, uint32_t now_ms)
{
    if (now_ms - w->second_ms >= 1000) {
        w->second_ms = now_ms;
        w->second_checks = w->second_rewrites = 0;
    }
    if (w->rewrite_s && now_ms / 1000 >= w->rewrite_s)
        w->held = 1;
    uint32_t passed_ms = now_ms - w->second_ms;
    uint32_t rewrites = w->held ? 0 : due(w->rewrite_per_s, passed_ms);
    uint32_t checks = due(w->check_per_s, passed_ms);
    for (int i = 0; i < SLICE && w->second_rewrites < rewrites; i++, w->second_rewrites++) {
        uint64_t pick = mix(w->seed ^ 0x91c4, w->rewrites) >> 32;
        rewrite_page(w, (uint32_t)((pick * w->pages) >> 32));
    }
    for (int i = 0; i < SLICE && w->second_checks < checks; i++, w->second_checks++) {
        check_page(w, w->cursor);
        w->checks++;
        if (++w->cursor == w->pages) {
            w->cursor = 0;
            w->passes++;
        }
    }
    return w->second_rewrites < rewrites || w->second_checks < checks;
}

/* Reads all over the area. Each word follows from the one before, so that no two reads overlap. */
static void roam(struct worker *w)
{
    uint32_t random = w->random, word = w->word;
    for (int i = 0; i < ROAM_READS; i++) {
        random = random * 1664525u + 1013904223u;
        uint32_t page = (uint32_t)(((uint64_t)random * w->pages) >> 32);
        word = (uint32_t)w->area[(uint64_t)page * PAGE_WORDS + word] % PAGE_WORDS;
    }
    w->random = random;
    w->word = word;
    w->reads += ROAM_READS;
}

/* ---- commands that arrive on the serial port, one a line ---- */

/* hold, go, sum, rate N. Every one is answered by exactly one line. */
static void obey(struct worker *w, const char *command)
{
    struct line line;
    if (command[0] == 's') {
        begin(&line, " sum=");
        put_hex(&line, checksum(w));
    } else if (command[0] == 'h' || command[0] == 'g') {
        w->held = command[0] == 'h';
        if (!w->held)
            w->rewrite_s = 0;
        begin(&line, w->held ? " holding" : " going");
    } else if (command[0] == 'r') {
        uint32_t rate = 0;
        for (const char *c = command; *c; c++)
            if (*c >= '0' && *c <= '9')
                rate = rate * 10 + (uint32_t)(*c - '0');
        w->rewrite_per_s = rate;
        begin(&line, " rate=");
        put_dec(&line, rate);
    } else {
        begin(&line, " unknown command");
    }
    finish(&line);
}

/* Collects characters; returns 1 when `text` holds a whole line, ready to obey. */
static int take_character(struct line *input, char c)
{
    if (c != '\n' && c != '\r') {
        char one[2] = {c, 0};
        put(input, one);
        return 0;
    }
    if (!input->used)
        return 0;
    input->used = 0; /* the text stays readable until the next character */
    return 1;
}

#endif
