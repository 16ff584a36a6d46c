/* Several gates one after the other, without Python's lock: what `live.LiveSession` does for
 * one batch, as long as nothing is unusual.
 *
 * Owns no decision and no memory. Each gate is begun only with a thread of QEMU that is kept
 * and waits for its guard. Anything unusual is left to Python, which has the rules for it:
 * before a launch the gate is returned unused, after a launch the batch as it then is.
 * The caller holds the resolver's lock all the time, so faults are served here after each gate.
 *
 * SAFETY: the steps and their order are those of live.py and inject/remote.py, and so is what
 * a kill leaves behind at each step; tests kill at each of them (`step`).
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <errno.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Offsets in the table, in words, as in inject/table.py. */
enum { W_DONE = 3, W_CANCEL = 4, W_END = 5, W_LAST = 26, W_KEEP = 27, W_ROWS = 64 };
enum { ROW_WORDS = 8, CALL_WORDS = 7, ROW_BYTES = ROW_WORDS * 8 };

/* As in linux/pagemap.py. */
#define ENTRY_UFFD_WP (UINT64_C(1) << 57)
#define ENTRY_OF_PAGE (~(UINT64_C(1) << 55 | UINT64_C(1) << 56))
enum { PAGE_SHIFT = 12, PAGE_BYTES = 1 << PAGE_SHIFT, ENTRY_BYTES = 8 };
enum { READ_OVER_PAGES = 32, MOST_ENTRIES = 2048 };

enum { MOST_MESSAGES = 64, MOST_TRIES = 20000, MOST_DEPTH = 8 };
#define WAIT_SLICE_NS INT64_C(50000000)

/* The state that `run` returns besides the number of finished gates. */
enum { GO_ON, CAREFUL, LAUNCHED, NOT_GIVEN };

struct gates {
    int pagemap, userfault, socket, pidfd;
    uint64_t *table;
    uint64_t table_there;
    volatile uint64_t *beat;
    int64_t deadline_ns;
    PyObject *fault;
    PyThreadState *thread;
    Py_ssize_t lifted;
    int depth;
};

struct batch {
    Py_ssize_t runs, calls;
    const int64_t *start, *pages;
    const uint64_t *seen, *call;
    int64_t *result;
};

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Call the fault hook of the tests, if there is one. */
static void step(struct gates *gates, const char *name)
{
    if (!gates->fault)
        return;
    PyEval_RestoreThread(gates->thread);
    PyObject *told = PyObject_CallFunction(gates->fault, "s", name);
    if (!told)
        PyErr_WriteUnraisable(gates->fault);
    Py_XDECREF(told);
    gates->thread = PyEval_SaveThread();
}

/* Whether the kernel says that every page is protected and as it was witnessed. */
static int is_held(const struct gates *gates, const struct batch *batch)
{
    uint64_t entries[MOST_ENTRIES];
    const uint64_t *seen = batch->seen;
    Py_ssize_t next = 0;
    while (next < batch->runs) {
        /* Neighbours over narrow gaps are read at once. */
        Py_ssize_t first = next++;
        int64_t low = batch->start[first] >> PAGE_SHIFT;
        int64_t high = low + batch->pages[first];
        for (; next < batch->runs; next++) {
            int64_t start = batch->start[next] >> PAGE_SHIFT, end = start + batch->pages[next];
            if (start < high || start - high > READ_OVER_PAGES || end - low > MOST_ENTRIES)
                break;
            high = end;
        }
        if (high - low > MOST_ENTRIES)
            return 0;
        ssize_t size = (high - low) * ENTRY_BYTES;
        if (pread(gates->pagemap, entries, size, low * ENTRY_BYTES) != size)
            return 0;
        for (Py_ssize_t run = first; run < next; run++) {
            const uint64_t *entry = entries + ((batch->start[run] >> PAGE_SHIFT) - low);
            for (int64_t page = 0; page < batch->pages[run]; page++, entry++, seen++)
                if (!(*entry & ENTRY_UFFD_WP) || ((*entry ^ *seen) & ENTRY_OF_PAGE))
                    return 0;
        }
    }
    return 1;
}

/* Write the calls into the table. SAFETY: the kept thread waits for its guard and does not read
 * the table. */
static void fill(const struct gates *gates, const struct batch *batch)
{
    uint64_t *table = gates->table;
    table[W_DONE] = table[W_END] = table[W_CANCEL] = 0;
    table[W_LAST] = gates->table_there + W_ROWS * 8 + batch->calls * ROW_BYTES;
    for (Py_ssize_t row = 0; row < batch->calls; row++) {
        uint64_t *words = table + W_ROWS + row * ROW_WORDS;
        memcpy(words, batch->call + row * CALL_WORDS, CALL_WORDS * 8);
        words[CALL_WORDS] = (uint64_t)INT64_MIN; /* no floor */
    }
}

/* Send the guard to the thread that waits for it, which launches the batch; see inject/guard.py. */
static int give(const struct gates *gates)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    char byte = 0;
    struct iovec data = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &data,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof control.space,
    };
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &gates->userfault, sizeof(int));
    return sendmsg(gates->socket, &message, MSG_NOSIGNAL) == 1;
}

/* Whether the launched batch has ended before `until_ns`. */
static int has_ended(const struct gates *gates, int64_t until_ns)
{
    uint32_t *done = (uint32_t *)(gates->table + W_DONE);
    while (!__atomic_load_n(done, __ATOMIC_ACQUIRE)) {
        int64_t left_ns = until_ns - now_ns();
        struct pollfd process = {gates->pidfd, POLLIN, 0};
        if (left_ns <= 0 || poll(&process, 1, 0) != 0)
            return 0;
        struct timespec most = {0, left_ns < WAIT_SLICE_NS ? left_ns : WAIT_SLICE_NS};
        syscall(SYS_futex, done, FUTEX_WAIT, 0, &most, NULL, 0);
    }
    return 1;
}

/* Whether all calls were run, each run is mapped where it should be, and nothing else failed. */
static int take_results(const struct gates *gates, const struct batch *batch)
{
    const uint64_t *table = gates->table;
    if (table[W_END] != table[W_LAST] || !table[W_KEEP])
        return 0;
    for (Py_ssize_t row = 0; row < batch->calls; row++) {
        int64_t result = (int64_t)table[W_ROWS + row * ROW_WORDS + CALL_WORDS];
        if (row < batch->runs ? result != batch->start[row] : result < 0)
            return 0;
        batch->result[row] = result;
    }
    return 1;
}

static int wake(const struct gates *gates, int64_t start, int64_t bytes)
{
    struct uffdio_range range = {(uint64_t)start, (uint64_t)bytes};
    return ioctl(gates->userfault, UFFDIO_WAKE, &range);
}

static int serve(struct gates *gates);

/* Lift a range. While a discard is beginning the kernel says EAGAIN, until its message was read
 * and the discard was done. */
static int lift(struct gates *gates, uint64_t start, uint64_t bytes)
{
    struct timespec pause = {0, 50000};
    for (int tries = 0; tries < MOST_TRIES; tries++) {
        struct uffdio_writeprotect range = {{start, bytes}, 0};
        if (!ioctl(gates->userfault, UFFDIO_WRITEPROTECT, &range))
            return 0;
        if (errno == ENOENT) { /* just remapped, in whole or in part: not registered any more */
            for (uint64_t page = start; bytes > PAGE_BYTES && page < start + bytes;
                 page += PAGE_BYTES)
                if (lift(gates, page, PAGE_BYTES))
                    return -1;
            return wake(gates, (int64_t)start, (int64_t)bytes);
        }
        if (errno != EAGAIN)
            return -1;
        if (gates->depth < MOST_DEPTH) {
            gates->depth++;
            int failed = serve(gates);
            gates->depth--;
            if (failed)
                return -1;
        }
        nanosleep(&pause, NULL);
    }
    return -1;
}

/* Lift every page that a writer waits for now, and discarded ranges, as `Resolver.serve`. */
static int serve(struct gates *gates)
{
    struct uffd_msg messages[MOST_MESSAGES];
    ssize_t size = read(gates->userfault, messages, sizeof messages);
    if (size < 0)
        return errno == EAGAIN ? 0 : -1;
    for (size_t number = 0; number < size / sizeof *messages; number++) {
        if (messages[number].event == UFFD_EVENT_REMOVE) {
            /* SAFETY: done before the next gate, so no gate holds pages of a discard. */
            uint64_t start = messages[number].arg.remove.start;
            if (lift(gates, start, messages[number].arg.remove.end - start))
                return -1;
            continue;
        }
        if (messages[number].event != UFFD_EVENT_PAGEFAULT)
            continue;
        uint64_t page = messages[number].arg.pagefault.address >> PAGE_SHIFT << PAGE_SHIFT;
        if (lift(gates, page, PAGE_BYTES))
            return -1;
        gates->lifted++;
    }
    return 0;
}

/* Run one gate: GO_ON if it ended; or the state that is left to the caller; or -errno. */
static int gate(struct gates *gates, const struct batch *batch, int64_t closed_at)
{
    *gates->beat = (uint64_t)closed_at;
    step(gates, "burst-closed");
    if (!is_held(gates, batch) || now_ns() - closed_at >= gates->deadline_ns)
        return CAREFUL;
    /* SAFETY: every page of these calls is held and was compared equal. */
    step(gates, "burst-verified");
    fill(gates, batch);
    step(gates, "burst-filled");
    if (!give(gates))
        return NOT_GIVEN;
    step(gates, "burst-launched");
    if (!has_ended(gates, closed_at + gates->deadline_ns) || !take_results(gates, batch))
        return LAUNCHED;
    step(gates, "burst-completed");
    /* No page of the batch is registered any more: waiters are woken and retry. */
    Py_ssize_t last = batch->runs - 1;
    int64_t end = batch->start[last] + (batch->pages[last] << PAGE_SHIFT);
    if (wake(gates, batch->start[0], end - batch->start[0]) || serve(gates))
        return -errno;
    return GO_ON;
}

/* Whether the runs of a gate ascend, have `pages` pages in all, and are what its first calls
 * remap: only the pages of runs are checked before a launch. */
static int are_its_runs(const struct batch *batch, Py_ssize_t pages)
{
    int64_t end = 0;
    for (Py_ssize_t run = 0; run < batch->runs; run++) {
        const uint64_t *call = batch->call + run * CALL_WORDS;
        int64_t count = batch->pages[run];
        if (batch->start[run] < end || count < 1 || count > pages)
            return 0;
        end = batch->start[run] + (count << PAGE_SHIFT);
        pages -= count;
        if (call[call[0] == SYS_mremap ? 5 : 1] != (uint64_t)batch->start[run] ||
            call[call[0] == SYS_mremap ? 3 : 2] != (uint64_t)count << PAGE_SHIFT)
            return 0;
    }
    return pages == 0;
}

static int has_room(const Py_buffer *buffer, Py_ssize_t words)
{
    return words >= 0 && buffer->len / 8 >= words;
}

static const char RUN_DOC[] =
    "run(fds, addresses, limits, gates, start, pages, seen, calls, results, closed_ns,\n"
    "    fault)\n--\n\n"
    "Close gates until one is not to be closed here; returns (done, state, lifted pages).\n\n"
    "All buffers hold words of 64 bits. `gates`: for each its runs, pages and calls; the rows\n"
    "of `calls` that remap its runs come first. `limits`: nanoseconds until a gate is missed, and\n"
    "until no other is begun, and the most calls that the table takes. `closed_ns` takes how\n"
    "long each was closed, also the one that is left to the caller.\n"
    "Raises OSError when the userfaultfd cannot be used.";

static PyObject *run(PyObject *self, PyObject *args)
{
    struct gates gates = {0};
    unsigned long long table, table_there, beat;
    long long deadline_ns, budget_ns, most_calls;
    Py_buffer counts, start, pages, seen, calls, results, closed_ns;
    PyObject *fault, *told = NULL;
    if (!PyArg_ParseTuple(args, "(iiii)(KKK)(LLL)y*y*y*y*y*w*w*O", &gates.pagemap,
                          &gates.userfault, &gates.socket, &gates.pidfd, &table, &table_there,
                          &beat, &deadline_ns, &budget_ns, &most_calls, &counts, &start, &pages,
                          &seen, &calls, &results, &closed_ns, &fault))
        return NULL;
    gates.table = (uint64_t *)(uintptr_t)table;
    gates.table_there = table_there;
    gates.beat = (uint64_t *)(uintptr_t)beat;
    gates.deadline_ns = deadline_ns;
    gates.fault = fault == Py_None ? NULL : fault;

    const int64_t *count = counts.buf;
    const Py_ssize_t all = counts.len / 8 / 3;
    Py_ssize_t some_runs = 0, some_pages = 0, some_calls = 0, done = 0;
    for (Py_ssize_t number = 0; number < all; number++) {
        int is_good = count[3 * number] > 0 && count[3 * number + 2] >= count[3 * number] &&
                      count[3 * number + 1] > 0 && count[3 * number + 2] <= most_calls;
        some_runs += count[3 * number];
        some_pages += count[3 * number + 1];
        some_calls += count[3 * number + 2];
        if (!is_good || !has_room(&start, some_runs) || !has_room(&pages, some_runs) ||
            !has_room(&seen, some_pages) || !has_room(&calls, some_calls * CALL_WORDS) ||
            !has_room(&results, some_calls) || !has_room(&closed_ns, all)) {
            PyErr_SetString(PyExc_ValueError, "the buffers are too small for the gates");
            goto out;
        }
        struct batch batch = {
            .runs = count[3 * number],
            .start = (int64_t *)start.buf + some_runs - count[3 * number],
            .pages = (int64_t *)pages.buf + some_runs - count[3 * number],
            .call = (uint64_t *)calls.buf + (some_calls - count[3 * number + 2]) * CALL_WORDS,
        };
        if (!are_its_runs(&batch, count[3 * number + 1])) {
            PyErr_SetString(PyExc_ValueError, "the calls are not those of ascending runs");
            goto out;
        }
    }

    struct batch batch = {
        .start = start.buf,
        .pages = pages.buf,
        .seen = seen.buf,
        .call = calls.buf,
        .result = results.buf,
    };
    int state = GO_ON;
    gates.thread = PyEval_SaveThread();
    for (int64_t began = now_ns(); done < all; done++, count += 3) {
        int64_t closed_at = now_ns();
        if (done && closed_at - began > budget_ns)
            break;
        batch.runs = count[0];
        batch.calls = count[2];
        state = gate(&gates, &batch, closed_at);
        ((int64_t *)closed_ns.buf)[done] = now_ns() - closed_at;
        if (state != GO_ON)
            break;
        batch.start += count[0];
        batch.pages += count[0];
        batch.seen += count[1];
        batch.call += count[2] * CALL_WORDS;
        batch.result += count[2];
    }
    PyEval_RestoreThread(gates.thread);
    if (state < 0) {
        errno = -state;
        PyErr_SetFromErrno(PyExc_OSError);
    } else {
        told = Py_BuildValue("nin", done, state, gates.lifted);
    }
out:
    PyBuffer_Release(&counts);
    PyBuffer_Release(&start);
    PyBuffer_Release(&pages);
    PyBuffer_Release(&seen);
    PyBuffer_Release(&calls);
    PyBuffer_Release(&results);
    PyBuffer_Release(&closed_ns);
    return told;
}

static PyMethodDef functions[] = {{"run", run, METH_VARARGS, RUN_DOC}, {0}};

static int fill_module(PyObject *module)
{
    PyObject *layout = Py_BuildValue("(iiiiii)", W_DONE, W_CANCEL, W_END, W_LAST, W_KEEP, W_ROWS);
    int failed = PyModule_AddObjectRef(module, "TABLE_WORDS", layout);
    Py_XDECREF(layout);
    PyObject *masks = Py_BuildValue("(KK)", ENTRY_UFFD_WP, ENTRY_OF_PAGE);
    failed |= PyModule_AddObjectRef(module, "ENTRY_MASKS", masks);
    Py_XDECREF(masks);
    return failed;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill_module}, {0}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "vmdedup.remap._gates", "Several gates one after the other.", 0,
    functions, slots,
};

PyMODINIT_FUNC PyInit__gates(void)
{
    return PyModuleDef_Init(&module);
}
