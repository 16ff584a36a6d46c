/*
 * Reads a disk into pages that a merger wants to have.
 *
 * Every 4 KiB block of the disk holds the content that follows from its number.
 * A buffer page holds still for a while with content that many pages (of every
 * such guest) have in common; then a read of some block into it is started with
 * O_DIRECT, and until the device has written, the page still looks like all its
 * twins. Afterwards it must hold the block. It keeps that for a while (two
 * guests, or two pages, often hold the same block), must still hold it then, and
 * goes back to common content. `depth` reads are in flight at a time.
 *
 * A read that is not found in its page was lost: the page was merged under it.
 */
#include <linux/aio_abi.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include <linux/fs.h>

enum { DISK_SEED = 0xd15c, COMMON_CONTENTS = 4 };

enum buffer_state { HOLDS_COMMON, IN_FLIGHT, HOLDS_BLOCK };

struct buffer {
    volatile uint64_t *words;
    struct iocb request;
    enum buffer_state state;
    uint64_t key; /* of the content it must have, or is to have after the read */
    uint32_t due_ms;
};

struct dma {
    int disk;
    aio_context_t context;
    struct buffer *buffers;
    uint32_t count, depth, hold_ms, in_flight;
    uint64_t blocks, common, seed, drawn;
    uint64_t reads, wrong;
    int pause, paused; /* asked for; reached */
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

/* The buffer must hold its content: counts and tells when it does not. */
static void check_buffer(struct dma *dma, uint32_t number, const char *when)
{
    struct line line;
    const struct buffer *b = &dma->buffers[number];
    int word = first_wrong(b->words, b->key, 0, PAGE_WORDS);
    if (word == PAGE_WORDS || __atomic_add_fetch(&dma->wrong, 1, __ATOMIC_RELAXED) > DETAILS)
        return;
    begin(&line, " error dma ");
    put(&line, when);
    put_field(&line, "buffer", number);
    put_field(&line, "word", (uint64_t)word);
    put(&line, " got=");
    put_hex(&line, b->words[word]);
    put(&line, " want=");
    put_hex(&line, b->key + (uint64_t)word * STEP);
    finish(&line);
}

/* Between half and one and a half of `hold_ms`, so that buffers do not march in step. */
static uint32_t hold_until(struct dma *dma, uint32_t now_ms)
{
    uint32_t chance = (uint32_t)mix(dma->seed, ++dma->drawn);
    return now_ms + dma->hold_ms / 2 + chance % (dma->hold_ms + 1);
}

static void hold_common(struct dma *dma, struct buffer *b, uint32_t now_ms)
{
    b->key = content_key(DMA_COMMON, dma->common, mix(dma->seed, ++dma->drawn) % COMMON_CONTENTS);
    fill(b->words, b->key);
    b->state = HOLDS_COMMON;
    b->due_ms = hold_until(dma, now_ms);
}

static void start_read(struct dma *dma, uint32_t number)
{
    struct buffer *b = &dma->buffers[number];
    uint64_t block = mix(dma->seed ^ DISK_SEED, ++dma->drawn) % dma->blocks;
    struct iocb *request = &b->request;
    check_buffer(dma, number, "before a read");
    memset(request, 0, sizeof *request);
    request->aio_data = number;
    request->aio_lio_opcode = IOCB_CMD_PREAD;
    request->aio_fildes = (uint32_t)dma->disk;
    request->aio_buf = (uint64_t)(uintptr_t)b->words;
    request->aio_nbytes = PAGE_BYTES;
    request->aio_offset = (int64_t)(block * PAGE_BYTES);
    b->key = content_key(DISK_BLOCK, DISK_SEED, block);
    b->state = IN_FLIGHT;
    dma->in_flight++;
    if (syscall(SYS_io_submit, dma->context, 1L, &request) != 1)
        fail("io_submit");
}

/* Waits at most `wait_ms` for a read to end. */
static void finish_reads(struct dma *dma, uint32_t wait_ms)
{
    struct io_event events[64];
    struct timespec patience = {.tv_nsec = wait_ms * 1000000L};
    long ended = syscall(SYS_io_getevents, dma->context, 1L, 64L, events, &patience);
    for (long i = 0; i < ended; i++) {
        uint32_t number = (uint32_t)events[i].data;
        struct buffer *b = &dma->buffers[number];
        if (events[i].res != PAGE_BYTES)
            fail("a read of the disk failed");
        dma->in_flight--;
        __atomic_add_fetch(&dma->reads, 1, __ATOMIC_RELAXED);
        check_buffer(dma, number, "read");
        b->state = HOLDS_BLOCK;
        b->due_ms = hold_until(dma, clock_ms());
    }
}

static void wait_while_paused(struct dma *dma)
{
    pthread_mutex_lock(&dma->lock);
    while (dma->pause) {
        if (dma->in_flight) {
            pthread_mutex_unlock(&dma->lock);
            finish_reads(dma, IDLE_MS);
            pthread_mutex_lock(&dma->lock);
            continue;
        }
        dma->paused = 1;
        pthread_cond_broadcast(&dma->changed);
        pthread_cond_wait(&dma->changed, &dma->lock);
    }
    dma->paused = 0;
    pthread_mutex_unlock(&dma->lock);
}

static void *run_dma(void *argument)
{
    struct dma *dma = argument;
    uint32_t now_ms = clock_ms();
    for (uint32_t number = 0;; number = (number + 1) % dma->count) {
        struct buffer *b = &dma->buffers[number];
        if (number == 0) {
            wait_while_paused(dma);
            finish_reads(dma, IDLE_MS);
            now_ms = clock_ms();
        }
        if (b->state == IN_FLIGHT || (int32_t)(now_ms - b->due_ms) < 0)
            continue;
        if (b->state == HOLDS_BLOCK) {
            check_buffer(dma, number, "after a read");
            hold_common(dma, b, now_ms);
            continue;
        }
        while (dma->in_flight >= dma->depth)
            finish_reads(dma, IDLE_MS);
        start_read(dma, number);
    }
    return NULL;
}

static void dma_pause(struct dma *dma, int pause)
{
    pthread_mutex_lock(&dma->lock);
    dma->pause = pause;
    pthread_cond_broadcast(&dma->changed);
    while (pause && !dma->paused)
        pthread_cond_wait(&dma->changed, &dma->lock);
    pthread_mutex_unlock(&dma->lock);
}

static void put_dma(struct line *line, struct dma *dma)
{
    put_field(line, "dma_reads", __atomic_load_n(&dma->reads, __ATOMIC_RELAXED));
    put_field(line, "dma_wrong", __atomic_load_n(&dma->wrong, __ATOMIC_RELAXED));
}

static struct dma *start_dma(const char *cmdline)
{
    static struct dma dma = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    uint64_t disk_bytes = 0;
    pthread_t thread;
    dma.disk = open("/dev/vda", O_RDONLY | O_DIRECT);
    if (dma.disk < 0 || ioctl(dma.disk, BLKGETSIZE64, &disk_bytes) || disk_bytes < PAGE_BYTES)
        fail("no disk for dma");
    dma.blocks = disk_bytes / PAGE_BYTES;
    dma.count = (uint32_t)parameter(cmdline, "dma_mib", 4) * 256;
    dma.depth = (uint32_t)parameter(cmdline, "dma_depth", 64);
    dma.hold_ms = (uint32_t)parameter(cmdline, "dma_hold_ms", 200);
    dma.seed = parameter(cmdline, "seed", 1);
    dma.common = parameter(cmdline, "common", 1);
    dma.buffers = resident_memory(dma.count * sizeof *dma.buffers);
    uint64_t *memory = resident_memory((size_t)dma.count * PAGE_BYTES);
    for (uint32_t number = 0; number < dma.count; number++) {
        dma.buffers[number].words = memory + (size_t)number * PAGE_WORDS;
        hold_common(&dma, &dma.buffers[number], clock_ms());
    }
    dma.pause = (int)parameter(cmdline, "hold", 0);
    if (syscall(SYS_io_setup, (long)dma.depth, &dma.context) ||
        pthread_create(&thread, NULL, run_dma, &dma))
        fail("dma cannot start");
    return &dma;
}
