/*
 * The memory worker as a Linux program: the tiny guest's only process.
 *
 * The area is anonymous memory, kept resident; parameters come from the kernel
 * command line, commands and lines go over ttyS0. With `vmdedup.dma=1` a second
 * thread reads a disk into further pages (dma.h). Never ends: it is pid 1.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "worker.h"

enum { IDLE_MS = 10, AWAITED = 6000, MARGIN_BYTES = 8 << 20, KEPT_CONTENT = 1 << 24, KEPT_COMMON = 512 };

static int serial;

static void emit(const char *text)
{
    /* One write a line: lines of two threads do not mix. */
    if (write(serial, text, strlen(text)) < 0)
        _exit(1);
}

static void fail(const char *what)
{
    struct line line;
    begin(&line, " failed: ");
    put(&line, what);
    finish(&line);
    tcdrain(serial);
    _exit(1); /* the end of pid 1: the kernel panics and QEMU ends */
}

static uint32_t clock_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint32_t)(now.tv_sec * 1000 + now.tv_nsec / 1000000);
}

static void *resident_memory(size_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (at == MAP_FAILED)
        fail("no memory");
    return at;
}

#include "dma.h"
#include "boot.h"

static void read_command_line(char *text, size_t size)
{
    int fd = open("/proc/cmdline", O_RDONLY);
    ssize_t got = fd < 0 ? -1 : read(fd, text, size - 1);
    if (got < 0)
        fail("/proc/cmdline cannot be read");
    text[got] = 0;
    text[strcspn(text, "\n")] = ' ';
    close(fd);
}

static void open_serial(void)
{
    struct termios mode;
    serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
    if (serial < 0 || tcgetattr(serial, &mode))
        _exit(1);
    cfmakeraw(&mode);
    mode.c_oflag = OPOST | ONLCR;
    tcsetattr(serial, TCSANOW, &mode);
}

/*
 * Memory beside the area that is checked: `keep MIB` fills it with content as the area's (of
 * each four pages two are `common` and repeated, one is unique and one is zero), `look` counts the pages
 * that are not as written and writes each sixteenth one anew, `end` gives it back.
 */
struct kept {
    uint64_t *words;
    size_t pages;
    uint64_t seed, common, generation;
};

static uint64_t kept_key(const struct kept *kept, size_t page, uint64_t generation)
{
    if (page % 16 == 0 && generation)
        return content_key(UNIQUE, kept->seed ^ generation, KEPT_CONTENT + page);
    if (page % 4 == 3)
        return 0;
    if (page % 4 == 0)
        return content_key(UNIQUE, kept->seed, KEPT_CONTENT + page);
    return content_key(SHARED, kept->common, KEPT_CONTENT + page % KEPT_COMMON);
}

/* Blocks that were just plugged are not online at once. */
static void await_free(size_t size)
{
    struct sysinfo info;
    for (int tries = 0; tries < AWAITED; tries++) {
        if (sysinfo(&info))
            fail("sysinfo");
        if (info.freeram * info.mem_unit > size + MARGIN_BYTES)
            return;
        usleep(IDLE_MS * 1000);
    }
    fail("too little memory is free");
}

static void keep(struct kept *kept, size_t size, const struct worker *w)
{
    await_free(size);
    kept->words = resident_memory(size);
    kept->pages = size / PAGE_BYTES;
    kept->seed = w->seed;
    kept->common = w->common;
    kept->generation = 0;
    for (size_t page = 0; page < kept->pages; page++)
        fill(kept->words + page * PAGE_WORDS, kept_key(kept, page, 0));
}

static uint64_t look_at(struct kept *kept)
{
    uint64_t wrong = 0;
    for (size_t page = 0; page < kept->pages; page++) {
        uint64_t *words = kept->words + page * PAGE_WORDS;
        uint64_t key = kept_key(kept, page, kept->generation);
        wrong += first_wrong(words, key, 0, PAGE_WORDS) < PAGE_WORDS;
    }
    kept->generation++;
    for (size_t page = 0; page < kept->pages; page += 16)
        fill(kept->words + page * PAGE_WORDS, kept_key(kept, page, kept->generation));
    return wrong;
}

static int obey_kept(const char *command, const struct worker *w)
{
    static struct kept kept;
    struct line line;
    if (command[0] == 'k') {
        keep(&kept, strtoul(command + strcspn(command, "0123456789"), NULL, 10) << 20, w);
        begin(&line, " kept=");
        put_dec(&line, kept.pages / 256);
    } else if (command[0] == 'l') {
        begin(&line, " wrong=");
        put_dec(&line, look_at(&kept));
    } else if (command[0] == 'e') {
        munmap(kept.words, kept.pages * PAGE_BYTES);
        kept.pages = 0;
        begin(&line, " ended");
    } else {
        return 0;
    }
    finish(&line);
    return 1;
}

/*
 * Memory beside the area, given back and taken anew: `take MIB` fills it with one
 * repeated page, `drop` gives it back to the kernel, `fresh MIB` takes as much again
 * and counts the pages that the kernel hands out with something in them.
 */
static int obey_loan(const char *command)
{
    static char *taken;
    static size_t taken_size;
    struct line line;
    size_t size = strtoul(command + strcspn(command, "0123456789"), NULL, 10) << 20;
    if (command[0] == 't') {
        taken = resident_memory(taken_size = size);
        memset(taken, 0xa5, size);
        begin(&line, " taken=");
        put_dec(&line, size >> 20);
    } else if (command[0] == 'd') {
        munmap(taken, taken_size);
        begin(&line, " dropped");
    } else if (command[0] == 'f') {
        uint64_t *word = resident_memory(size), wrong = 0;
        for (size_t page = 0; page < size / PAGE_BYTES; page++) {
            size_t i = 0;
            while (i < PAGE_WORDS && !word[page * PAGE_WORDS + i])
                i++;
            wrong += i < PAGE_WORDS;
        }
        munmap(word, size);
        begin(&line, " stale=");
        put_dec(&line, wrong);
    } else {
        return 0;
    }
    finish(&line);
    return 1;
}

static void take_input(struct worker *w, struct dma *dma, struct line *input)
{
    char text[64];
    struct pollfd waiting = {.fd = serial, .events = POLLIN};
    while (poll(&waiting, 1, 0) > 0) {
        ssize_t got = read(serial, text, sizeof text);
        for (ssize_t i = 0; i < got; i++)
            if (take_character(input, text[i])) {
                if (input->text[0] == 'b')
                    boot(input);
                if (obey_loan(input->text) || obey_kept(input->text, w))
                    continue;
                if (dma && input->text[0] == 'h')
                    dma_pause(dma, 1); /* before the answer: no read is under way then */
                obey(w, input->text);
                if (dma && input->text[0] == 'g')
                    dma_pause(dma, 0);
            }
        if (got <= 0)
            return;
    }
}

int main(void)
{
    static char cmdline[4096];
    static struct worker worker;
    struct line line, input = {.used = 0};
    open_serial();
    read_command_line(cmdline, sizeof cmdline);
    uint32_t pages = area_pages(cmdline);
    void *area = resident_memory((size_t)pages * PAGE_BYTES);
    start_worker(&worker, cmdline, area, resident_memory(pages * sizeof(struct page_state)));
    struct dma *dma = parameter(cmdline, "dma", 0) ? start_dma(cmdline) : NULL;
    say_ready(&worker);

    uint32_t start_ms = clock_ms(), told_ms = 0;
    for (;;) {
        take_input(&worker, dma, &input);
        uint32_t now_ms = clock_ms() - start_ms;
        if (now_ms - told_ms >= STATUS_MS) {
            told_ms = now_ms;
            begin_status(&worker, &line);
            if (dma)
                put_dma(&line, dma);
            finish(&line);
        }
        if (work(&worker, now_ms))
            continue;
        if (worker.roams)
            roam(&worker);
        else
            usleep(IDLE_MS * 1000);
    }
}
