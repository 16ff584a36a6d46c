/*
 * Another kernel without a reset: `boot CMDLINE` starts the one on /dev/vda, with the
 * initramfs on /dev/vdb and this command line, by kexec. QEMU is not told.
 *
 * To be included by guest.c.
 */
#ifndef VMDEDUP_BOOT_H
#define VMDEDUP_BOOT_H

/* The content of a disk as a file: kexec takes regular files only. */
static int file_of(const char *disk, const char *path)
{
    static char block[1 << 16];
    ssize_t got;
    int from = open(disk, O_RDONLY), to = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (from < 0 || to < 0)
        fail("boot: no disk");
    while ((got = read(from, block, sizeof block)) > 0)
        if (write(to, block, (size_t)got) != got)
            fail("boot: no memory");
    close(from);
    close(to);
    return open(path, O_RDONLY);
}

static void boot(const struct line *command)
{
    const char *words = command->text + strcspn(command->text, " ");
    if (*words != ' ' || strlen(command->text) == sizeof command->text - 1)
        fail("boot: no command line, or too long a one");
    words++;
    int kernel = file_of("/dev/vda", "/kernel"), initrd = file_of("/dev/vdb", "/initrd");
    if (syscall(SYS_kexec_file_load, kernel, initrd, strlen(words) + 1, words, 0ul))
        fail("boot: kexec_file_load");
    reboot(RB_KEXEC);
    fail("boot: kexec");
}

#endif
