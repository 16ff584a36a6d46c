/*
 * A process to inject into. Its second thread idles in futex like QEMU's RCU
 * thread and enters other states on command; its third keeps known patterns in
 * all its registers and checks them. Commands on stdin, one answer line each:
 *   tids               WORKER BUSY
 *   check              busy-loop rounds, errors, a checksum of the data
 *   state NAME MS      the worker enters that state (no answer awaited); "stack": so many KiB
 *   feed               one byte into the pipe that state "read" waits for
 *   result             waits for the worker: return value, errno, ms, errors
 *   alarms US          a signal every US microseconds to the busy thread
 *   alarmed            how many of them were handled
 *   handler MS         installs a signal handler that waits in futex for so long
 *   poke               sends that signal to the worker
 *   filter HEX         puts all threads under this system call filter
 *   protect            makes the stack of state "stack" read-only
 *   unstack            ends state "stack"
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int busy_round(const uint64_t *patterns, uint64_t *found, long loops, int wide);

enum { LINE_BYTES = 16384, PATTERN_WORDS = 16 + 8 * 32 + 8, DATA_WORDS = 1 << 17 };

static volatile int command_word, done_word;
static char state[32];
static long state_ms, state_result;
static int state_errno;
static double state_took_ms;
static volatile long worker_errors, busy_rounds, busy_errors;
static int feed[2];
static volatile int worker_tid, busy_tid;
static uint64_t data[DATA_WORDS];
static char alternate_stack[1 << 16];

static long futex(volatile int *word, int op, int value, const struct timespec *timeout)
{
    return syscall(SYS_futex, word, op, value, timeout, NULL, FUTEX_BITSET_MATCH_ANY);
}

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static struct timespec in_ms(long ms)
{
    return (struct timespec){ ms / 1000, ms % 1000 * 1000000 };
}

static struct timespec from_now(long ms)
{
    struct timespec until, wait = in_ms(ms);
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += wait.tv_sec + (until.tv_nsec + wait.tv_nsec) / 1000000000;
    until.tv_nsec = (until.tv_nsec + wait.tv_nsec) % 1000000000;
    return until;
}

static void worker_mask(sigset_t *set)
{
    sigemptyset(set);
    sigaddset(set, SIGUSR1);
    sigaddset(set, SIGRTMIN + 3);
}

static void check_signal_state(void)
{
    sigset_t expected, found;
    stack_t stack;
    worker_mask(&expected);
    pthread_sigmask(SIG_BLOCK, NULL, &found);
    for (int n = 1; n < 64; n++)
        if (sigismember(&expected, n) != sigismember(&found, n))
            worker_errors++;
    sigaltstack(NULL, &stack);
    if (stack.ss_sp != alternate_stack || stack.ss_size != sizeof alternate_stack || stack.ss_flags)
        worker_errors++;
}

static char *own_stack;
static size_t own_stack_bytes;
static volatile int stack_word;

/* Waits in futex on a stack of so many KiB, between pages that are not accessible. */
static long wait_on_own_stack(long kib)
{
    long result;
    own_stack_bytes = kib << 10;
    own_stack = (char *)mmap(NULL, own_stack_bytes + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
                             -1, 0) + 4096;
    if (mprotect(own_stack, own_stack_bytes, PROT_READ | PROT_WRITE))
        return -1;
    stack_word = 0;
    register long timeout asm("r10") = 0;
    while (!stack_word)
        asm volatile("mov %%rsp, %%rbx\n\tmov %5, %%rsp\n\tsyscall\n\tmov %%rbx, %%rsp"
                     : "=a"(result)
                     : "0"(SYS_futex), "D"(&stack_word), "S"(FUTEX_WAIT), "d"(0),
                       "r"(own_stack + own_stack_bytes - 2048), "r"(timeout)
                     : "rbx", "rcx", "r11", "memory");
    for (size_t i = 0; i < own_stack_bytes; i++)
        if (own_stack[i])
            return 1;
    return 0;
}

static long enter_state(void)
{
    struct timespec wait = in_ms(state_ms), left = { 0, 0 };
    static volatile int never;
    char byte = 0;
    if (!strcmp(state, "nanosleep"))
        return nanosleep(&wait, &left);
    if (!strcmp(state, "read"))
        return read(feed[0], &byte, 1) == 1 ? byte : -1;
    if (!strcmp(state, "poll")) {
        struct pollfd fd = { feed[0], POLLIN, 0 };
        return poll(&fd, 1, state_ms);
    }
    if (!strcmp(state, "ppoll")) {
        struct pollfd fd = { feed[0], POLLIN, 0 };
        sigset_t meanwhile;
        sigfillset(&meanwhile);
        return ppoll(&fd, 1, &wait, &meanwhile);
    }
    if (!strcmp(state, "select")) {
        struct timeval timeout = { state_ms / 1000, state_ms % 1000 * 1000 };
        return select(0, NULL, NULL, NULL, &timeout);
    }
    if (!strcmp(state, "futex-relative"))
        return futex(&never, FUTEX_WAIT, 0, &wait);
    if (!strcmp(state, "futex-absolute")) {
        struct timespec until = from_now(state_ms);
        return futex(&never, FUTEX_WAIT_BITSET, 0, &until);
    }
    if (!strcmp(state, "spin")) {
        double until = now_ms() + state_ms;
        while (now_ms() < until)
            ;
        return 0;
    }
    if (!strcmp(state, "stack"))
        return wait_on_own_stack(state_ms);
    if (!strcmp(state, "vfork")) {
        if (!vfork()) {
            nanosleep(&wait, NULL);
            _exit(0);
        }
        return 0;
    }
    if (!strcmp(state, "end"))
        syscall(SYS_exit, 0);
    errno = EINVAL;
    return -1;
}

static void *worker(void *unused)
{
    stack_t stack = { .ss_sp = alternate_stack, .ss_size = sizeof alternate_stack };
    sigset_t mask;
    sigaltstack(&stack, NULL);
    worker_mask(&mask);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    worker_tid = syscall(SYS_gettid);
    for (int served = 0;; served++) {
        while (command_word == served)
            if (futex(&command_word, FUTEX_WAIT, served, NULL) && errno != EAGAIN)
                worker_errors++;
        double started = now_ms();
        errno = 0;
        state_result = enter_state();
        state_errno = errno;
        state_took_ms = now_ms() - started;
        check_signal_state();
        done_word = served + 1;
        futex(&done_word, FUTEX_WAKE, 1, NULL);
    }
    return unused;
}

static void *busy(void *unused)
{
    static uint64_t patterns[PATTERN_WORDS] __attribute__((aligned(64)));
    static uint64_t found[PATTERN_WORDS] __attribute__((aligned(64)));
    int wide = __builtin_cpu_supports("avx512f") ? 2 : __builtin_cpu_supports("avx2") ? 1 : 0;
    if (getenv("VICTIM_SSE_ONLY"))
        wide = 0;
    busy_tid = syscall(SYS_gettid);
    for (uint64_t round = 1;; round++) {
        for (int i = 0; i < PATTERN_WORDS; i++)
            patterns[i] = (round + i) * 0x9E3779B97F4A7C15ull;
        memcpy(found, patterns, sizeof found);
        int flags_kept = busy_round(patterns, found, 20000, wide);
        if (!flags_kept || memcmp(found, patterns, sizeof found))
            busy_errors++;
        busy_rounds++;
    }
    return unused;
}

static volatile long alarms_handled;

static void on_alarm(int number)
{
    volatile char deep[8192];
    deep[0] = deep[sizeof deep - 1] = number;
    alarms_handled++;
}

static int start_alarms(long us)
{
    struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
    struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGALRM };
    struct itimerspec every = { { 0, us * 1000 }, { 0, us * 1000 } };
    timer_t timer;
    event._sigev_un._tid = busy_tid;
    return sigaction(SIGALRM, &action, NULL) || timer_create(CLOCK_MONOTONIC, &event, &timer)
        || timer_settime(timer, 0, &every, NULL);
}

static long handler_ms;
static pthread_t worker_thread;

static void on_poke(int number)
{
    static volatile int never;
    int before = errno;
    struct timespec until = from_now(handler_ms);
    (void)number;
    while (futex(&never, FUTEX_WAIT_BITSET, 0, &until) && errno != ETIMEDOUT)
        ;
    errno = before;
}

static int install_handler(long ms)
{
    struct sigaction action = { .sa_handler = on_poke, .sa_flags = SA_RESTART };
    handler_ms = ms;
    return sigaction(SIGUSR2, &action, NULL);
}

static long install_filter(const char *hex)
{
    static unsigned char code[LINE_BYTES / 2];
    struct sock_fprog program = { 0, (struct sock_filter *)code };
    unsigned byte;
    size_t bytes = 0;
    for (; sscanf(hex + 2 * bytes, "%2x", &byte) == 1; bytes++)
        code[bytes] = byte;
    program.len = bytes / sizeof(struct sock_filter);
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
}

static uint64_t checksum(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < DATA_WORDS; i++)
        sum = sum * 31 + data[i];
    return sum;
}

static void answer(char *line)
{
    static int given;
    long us, ms;
    if (!strncmp(line, "tids", 4)) {
        printf("%d %d\n", worker_tid, busy_tid);
    } else if (!strncmp(line, "check", 5)) {
        long before = busy_rounds;
        while (busy_rounds < before + 3)
            usleep(100);
        printf("%ld %ld %016lx\n", busy_rounds, busy_errors + worker_errors, checksum());
    } else if (sscanf(line, "state %31s %ld", state, &state_ms) == 2) {
        command_word = ++given;
        futex(&command_word, FUTEX_WAKE, 1, NULL);
        printf("ok\n");
    } else if (!strncmp(line, "feed", 4)) {
        printf("%ld\n", (long)write(feed[1], "F", 1));
    } else if (!strncmp(line, "result", 6)) {
        while (done_word != given)
            futex(&done_word, FUTEX_WAIT, done_word == given ? -1 : done_word, NULL);
        printf("%ld %d %.3f %ld\n", state_result, state_errno, state_took_ms, worker_errors);
    } else if (sscanf(line, "alarms %ld", &us) == 1) {
        printf("%d\n", start_alarms(us));
    } else if (!strncmp(line, "alarmed", 7)) {
        printf("%ld\n", alarms_handled);
    } else if (sscanf(line, "handler %ld", &ms) == 1) {
        printf("%d\n", install_handler(ms));
    } else if (!strncmp(line, "poke", 4)) {
        printf("%d\n", pthread_kill(worker_thread, SIGUSR2));
    } else if (!strncmp(line, "filter ", 7)) {
        printf("%ld\n", install_filter(line + 7));
    } else if (!strncmp(line, "protect", 7)) {
        printf("%d\n", mprotect(own_stack, own_stack_bytes, PROT_READ));
    } else if (!strncmp(line, "unstack", 7)) {
        stack_word = mprotect(own_stack, own_stack_bytes, PROT_READ | PROT_WRITE) + 1;
        printf("%d\n", stack_word - 1);
        futex(&stack_word, FUTEX_WAKE, 1, NULL);
    } else {
        printf("unknown\n");
    }
    fflush(stdout);
}

int main(void)
{
    static char line[LINE_BYTES];
    pthread_t thread;
    for (int i = 0; i < DATA_WORDS; i++)
        data[i] = i * 0xD1B54A32D192ED03ull;
    if (pipe(feed) || pthread_create(&worker_thread, NULL, worker, NULL))
        return 1;
    while (!worker_tid)
        usleep(100);
    if (pthread_create(&thread, NULL, busy, NULL))
        return 1;
    while (!busy_tid)
        usleep(100);
    while (fgets(line, sizeof line, stdin))
        answer(line);
    return 0;
}
