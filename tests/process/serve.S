# The server of vmdedup/linux/bounded.py, as source: the tests assemble it and compare.
# On entry: rdi = its mailbox (System V x86-64): request, first row, behind the last row,
# done, address of the loop (loop.S). A first row of 0 ends it.
        .intel_syntax noprefix
        push    rbx
        mov     rbx, rdi
again:  cmp     dword ptr [rbx], 0
        jne     work
        mov     eax, 202                # futex(&request, FUTEX_WAIT_PRIVATE, 0, NULL)
        mov     rdi, rbx
        mov     esi, 128
        xor     edx, edx
        xor     r10d, r10d
        syscall
        jmp     again
work:   mov     dword ptr [rbx], 0
        mov     rdi, [rbx + 8]
        test    rdi, rdi
        jz      out
        mov     rsi, [rbx + 16]
        call    [rbx + 32]
        mov     dword ptr [rbx + 24], 1
        mov     eax, 202                # futex(&done, FUTEX_WAKE_PRIVATE, 1)
        lea     rdi, [rbx + 24]
        mov     esi, 129
        mov     edx, 1
        syscall
        jmp     again
out:    pop     rbx
        ret
