/*
 * Pid 1 of a guest whose kernel's own KSM is asked for its counters.
 *
 * Makes pages of the contents that are compiled in (-DCOUNTS=300,257: so many
 * pages of each; the last content is zeroes), mixed with each other, has KSM scan them until
 * nothing changes, and prints a line for each value of use_zero_pages.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

enum { PAGE = 4096, MOST = 32, SCANS = 8 };

static void set(const char *name, const char *value)
{
    char path[99];
    snprintf(path, sizeof path, "/sys/kernel/mm/ksm/%s", name);
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, value, strlen(value)) < 0)
        printf("vmdedup-guest: failed: %s\n", path);
    close(fd);
}

static long get(const char *name)
{
    char path[99], text[32] = {0};
    snprintf(path, sizeof path, "/sys/kernel/mm/ksm/%s", name);
    int fd = open(path, O_RDONLY);
    if (fd < 0 || read(fd, text, sizeof text - 1) < 0)
        printf("vmdedup-guest: failed: %s\n", path);
    close(fd);
    return atol(text);
}

static void scan(int use_zero_pages, const int *counts, int kinds)
{
    size_t bytes = 0;
    int left[MOST];
    for (int i = 0; i < kinds; i++)
        bytes += (size_t)counts[i] * PAGE;
    memcpy(left, counts, sizeof left);
    char *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(memory, bytes, MADV_NOHUGEPAGE);
    for (char *page = memory; page < memory + bytes;)
        for (int i = 0; i < kinds; i++)
            if (left[i] > 0) {
                left[i]--;
                memset(page, i == kinds - 1 ? 0 : i + 1, PAGE);
                page += PAGE;
            }
    if (madvise(memory, bytes, MADV_MERGEABLE))
        printf("vmdedup-guest: failed: MADV_MERGEABLE\n");
    set("use_zero_pages", use_zero_pages ? "1" : "0");
    set("pages_to_scan", "100000");
    set("sleep_millisecs", "0");
    set("run", "1");
    for (long first = get("full_scans"); get("full_scans") < first + SCANS;)
        usleep(50000);
    set("run", "0");
    printf("vmdedup-guest: use_zero_pages=%d max_page_sharing=%ld pages_shared=%ld"
           " pages_sharing=%ld zero_pages=%ld\n", use_zero_pages, get("max_page_sharing"),
           get("pages_shared"), get("pages_sharing"), get("ksm_zero_pages"));
    set("run", "2");
    munmap(memory, bytes);
}

int main(void)
{
    const int counts[MOST] = {COUNTS}, given[] = {COUNTS};
    int kinds = sizeof given / sizeof *given;
    mount("sys", "/sys", "sysfs", 0, 0);
    mount("dev", "/dev", "devtmpfs", 0, 0);
    dup2(open("/dev/ttyS0", O_WRONLY), 1);
    scan(0, counts, kinds);
    scan(1, counts, kinds);
    fflush(stdout);
    tcdrain(1);
    reboot(RB_POWER_OFF);
    return 0;
}
