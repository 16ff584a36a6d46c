# The loop stub of vmdedup/inject/x86_64.py, as source. The tests assemble it and
# compare; the table (offsets as in inject/table.py) is mapped right behind the code page.
# On entry: rsp = the thread's own; what the other registers hold is in the table.
        .intel_syntax noprefix
        .set    TABLE, start + 4096
        .set    BUSY, TABLE + 16
        .set    DONE, TABLE + 24
        .set    CANCEL, TABLE + 32
        .set    END, TABLE + 40
        .set    SAVED, TABLE + 64
        .set    LAST, TABLE + 208
        .set    KEEP, TABLE + 216
        .set    SOCKET, TABLE + 224
        .set    MESSAGE, TABLE + 232
        .set    CONTROL_SIZE, MESSAGE + 40
        .set    GUARD, TABLE + 328
        .set    ROWS, TABLE + 384
start:  cmp     dword ptr [rip + SOCKET], 0
        jl      begin                           # needs no guard
take:   mov     dword ptr [rip + GUARD], -1
        mov     qword ptr [rip + CONTROL_SIZE], 24
        mov     edi, [rip + SOCKET]
        lea     rsi, [rip + MESSAGE]
        mov     edx, 0x40000000                 # MSG_CMSG_CLOEXEC
        mov     eax, 47                         # recvmsg: waits for one, or the stream's end
        syscall
        cmp     rax, -4                         # EINTR
        je      take
begin:  lea     rbx, [rip + ROWS]
        mov     rbp, [rip + LAST]
        cmp     dword ptr [rip + SOCKET], 0
        jl      next
        cmp     dword ptr [rip + GUARD], 0
        jge     next
        mov     dword ptr [rip + KEEP], 0       # none came: begin no call, and leave
        jmp     finish
next:   cmp     dword ptr [rip + CANCEL], 0
        jne     finish
        mov     rax, [rbx]
        mov     rdi, [rbx + 8]
        mov     rsi, [rbx + 16]
        mov     rdx, [rbx + 24]
        mov     r10, [rbx + 32]
        mov     r8, [rbx + 40]
        mov     r9, [rbx + 48]
        syscall
        cmp     rax, [rbx + 56]                 # the floor of this call
        mov     [rbx + 56], rax
        lea     rbx, [rbx + 64]
        jl      finish
        cmp     rbx, rbp
        jne     next
finish: mov     edi, [rip + GUARD]
        test    edi, edi
        js      tell
        mov     eax, 3                          # close
        syscall
tell:   mov     [rip + END], rbx
        mov     dword ptr [rip + DONE], 1
        mov     eax, 202                        # futex(&done, FUTEX_WAKE, INT_MAX)
        lea     rdi, [rip + DONE]
        mov     esi, 1
        mov     edx, 0x7fffffff
        syscall
        cmp     dword ptr [rip + KEEP], 0
        jne     take                            # another batch, when its guard comes
        lea     rsp, [rsp - 128]                # below the red zone
        push    qword ptr [rip + SAVED]         # rip, for the ret
        push    qword ptr [rip + SAVED + 8]
        popfq                                   # no instruction below changes a flag
        mov     rax, [rip + SAVED + 16]
        mov     rbx, [rip + SAVED + 24]
        mov     rcx, [rip + SAVED + 32]
        mov     rdx, [rip + SAVED + 40]
        mov     rsi, [rip + SAVED + 48]
        mov     rdi, [rip + SAVED + 56]
        mov     rbp, [rip + SAVED + 64]
        mov     r8, [rip + SAVED + 72]
        mov     r9, [rip + SAVED + 80]
        mov     r10, [rip + SAVED + 88]
        mov     r11, [rip + SAVED + 96]
        mov     r12, [rip + SAVED + 104]
        mov     r13, [rip + SAVED + 112]
        mov     r14, [rip + SAVED + 120]
        mov     r15, [rip + SAVED + 128]
        mov     dword ptr [rip + BUSY], 0       # the table may be used again
        ret     128
