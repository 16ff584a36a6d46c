/*
 * The bare test guest: the memory worker with no operating system under it.
 *
 * A 32-bit multiboot kernel without paging: guest-physical addresses are its
 * addresses. It sleeps in `hlt` between slices of work, woken 50 times a second
 * by the timer, and speaks on COM1. It keeps to instructions that KVM's own
 * emulator knows (no `iret`, no SSE), so that it also runs under a KVM that can
 * not run a stock kernel. Parameters: see README.md beside the recipes.
 */
#include "worker.h"

enum { COM1 = 0x3f8, PIC1 = 0x20, PIC2 = 0xa0, PIT = 0x40, TIMER_VECTOR = 32 };
enum { WAKES_PER_S = 50, PIT_HZ = 1193182, AREA_START = 2 << 20 };
enum { PM_TIMER = 0x608, PM_TIMER_PER_MS = 3580, PM_TIMER_MASK = 0xffffff }; /* SeaBIOS's place */

struct multiboot_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline;
};

static void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void emit(const char *text)
{
    for (; *text; text++) {
        while (!(inb(COM1 + 5) & 0x20))
            ;
        outb(COM1, (uint8_t)*text);
    }
}

static uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* ---- time, and a timer interrupt, the only one ---- */

static uint16_t idt[4 * (TIMER_VECTOR + 1)]; /* gates of 8 bytes */

/* Milliseconds since the first call, from ACPI's timer; to be called every 4 seconds or oftener. */
static uint32_t clock_ms(void)
{
    static uint32_t before, rest, ms;
    static int running;
    uint32_t now = inl(PM_TIMER);
    if (!running)
        running = 1;
    else
        rest += (now - before) & PM_TIMER_MASK;
    before = now;
    ms += rest / PM_TIMER_PER_MS;
    rest %= PM_TIMER_PER_MS;
    return ms;
}

/*
 * Sleeps until the next timer interrupt. Interrupts are enabled nowhere else, so
 * its gate leads to the instruction behind `hlt`, and dropping the frame is all
 * the return it needs.
 */
__asm__("sleep: sti\n hlt\n timer_entry: add $12, %esp\n ret\n");
void sleep(void);
void timer_entry(void);

/* Our own flat segments: what a loader leaves in the GDT register is not promised. */
static const uint64_t gdt[] = {0, 0x00cf9a000000ffffull, 0x00cf92000000ffffull};

static void start_timer(void)
{
    struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) table = {sizeof gdt - 1, (uint32_t)gdt};
    __asm__ volatile("lgdt %0\n ljmp $8, $1f\n1: mov $16, %%eax\n mov %%eax, %%ds\n"
                     " mov %%eax, %%es\n mov %%eax, %%ss" : : "m"(table) : "eax", "memory");
    uint32_t entry = (uint32_t)timer_entry;
    uint16_t *gate = &idt[TIMER_VECTOR * 4];
    gate[0] = (uint16_t)entry;
    gate[1] = 8;
    gate[2] = 0x8e00; /* present, 32-bit interrupt gate */
    gate[3] = (uint16_t)(entry >> 16);
    table.limit = sizeof idt - 1;
    table.base = (uint32_t)idt;
    __asm__ volatile("lidt %0" : : "m"(table));
    static const uint8_t set_up[][2] = {
        {PIC1, 0x11}, {PIC2, 0x11}, {PIC1 + 1, TIMER_VECTOR}, {PIC2 + 1, TIMER_VECTOR + 8},
        {PIC1 + 1, 4}, {PIC2 + 1, 2}, {PIC1 + 1, 1}, {PIC2 + 1, 1},
        {PIC1 + 1, 0xfe}, {PIC2 + 1, 0xff}, /* all masked but the timer */
    };
    for (unsigned i = 0; i < sizeof set_up / 2; i++)
        outb(set_up[i][0], set_up[i][1]);
    outb(PIT + 3, 0x34); /* channel 0, rate generator */
    outb(PIT, (PIT_HZ / WAKES_PER_S) & 0xff);
    outb(PIT, (PIT_HZ / WAKES_PER_S) >> 8);
}

static void start_serial(void)
{
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x83); /* the divisor: 115200 */
    outb(COM1, 1);
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x03);
    outb(COM1 + 2, 0x07); /* FIFO on, cleared */
}

/* gcc may call these even when freestanding. */
void *memset(void *to, int value, unsigned long size)
{
    uint8_t *c = to;
    while (size--)
        *c++ = (uint8_t)value;
    return to;
}

void *memcpy(void *to, const void *from, unsigned long size)
{
    uint8_t *c = to;
    const uint8_t *f = from;
    while (size--)
        *c++ = *f++;
    return to;
}

static struct worker worker;
static char cmdline[1024];

static void run(void)
{
    struct line line, input = {.used = 0};
    uint32_t told_ms = clock_ms();
    for (;;) {
        while (inb(COM1 + 5) & 1)
            if (take_character(&input, (char)inb(COM1)))
                obey(&worker, input.text);
        uint32_t now_ms = clock_ms();
        if (now_ms - told_ms >= STATUS_MS) {
            told_ms = now_ms;
            begin_status(&worker, &line);
            finish(&line);
        }
        if (work(&worker, now_ms))
            continue;
        if (worker.roams) {
            roam(&worker);
        } else {
            sleep();
            outb(PIC1, 0x20); /* end of interrupt */
        }
    }
}

__attribute__((used)) static void guest_main(const struct multiboot_info *info)
{
    start_serial();
    const char *given = info->flags & 4 ? (const char *)info->cmdline : "";
    for (unsigned i = 0; given[i] && i < sizeof cmdline - 1; i++)
        cmdline[i] = given[i]; /* it may stand where the area will */
    uint32_t pages = area_pages(cmdline);
    uint32_t state_bytes = (pages * sizeof(struct page_state) + PAGE_BYTES - 1) & -PAGE_BYTES;
    uint32_t end_kib = (AREA_START + state_bytes) / 1024 + pages * 4;
    if (end_kib > info->mem_upper + 1024) {
        struct line line;
        begin(&line, " failed: too little memory");
        put_field(&line, "needed_kib", end_kib);
        put_field(&line, "present_kib", info->mem_upper + 1024);
        finish(&line);
        for (;;)
            __asm__ volatile("cli\n hlt");
    }
    start_worker(&worker, cmdline, (void *)(AREA_START + state_bytes), (void *)AREA_START);
    start_timer();
    say_ready(&worker);
    run();
}

/* Multiboot 1 header (flags: memory information wanted), then the entry point. */
__asm__(".section .multiboot, \"a\"\n .align 4\n .long 0x1badb002, 2, -(0x1badb002 + 2)\n .text\n"
        ".globl _start\n_start: cli\n cld\n mov $stack_end, %esp\n push %ebx\n call guest_main\n"
        ".bss\n .align 16\n .skip 16384\nstack_end:\n .text\n");
