/*
 * Makes one thread for each letter of its argument, in that order, then says "ready":
 *   e  waits for an event in this program's data, as QEMU's RCU thread does
 *   l  waits for a lock in this program's data
 *   h  waits for an event on the heap, as a library's thread may
 *   p  pauses
 */
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BUSY = -1, LOCKED = 2, MOST = 8 };

static int words[MOST] = { BUSY };

static void *idle(void *word)
{
    while (word)
        syscall(SYS_futex, word, FUTEX_WAIT, *(int *)word, NULL, NULL, 0);
    for (;;)
        pause();
    return word;
}

int main(int count, char **arguments)
{
    pthread_t thread;
    for (int i = 0; count == 2 && i < MOST && arguments[1][i]; i++) {
        char kind = arguments[1][i];
        int *word = kind == 'p' ? NULL : kind == 'h' ? malloc(sizeof *words) : &words[i];
        if (word)
            *word = kind == 'l' ? LOCKED : BUSY;
        if (pthread_create(&thread, NULL, idle, word))
            return 1;
    }
    puts("ready");
    fflush(stdout);
    for (;;)
        pause();
}
