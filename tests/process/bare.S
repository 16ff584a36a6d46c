/*
 * A program without libc and without data. It idles in futex, in a `syscall; ret`, and has
 * what every libc has as sa_restorer, unless NO_RESTORER. It has no store to deliver results.
 */
    .globl _start
_start:
    mov     $202, %eax              /* futex */
    lea     word(%rip), %rdi
    mov     $128, %esi              /* FUTEX_WAIT_PRIVATE */
    xor     %edx, %edx
    xor     %r10d, %r10d
    call    system_call
    jmp     _start
system_call:
    syscall
    ret
#ifndef NO_RESTORER
    mov     $15, %rax               /* rt_sigreturn */
    syscall
#endif
    .balign 64, 0xcc
word:
    .long   0
    .fill   64, 1, 0xcc
