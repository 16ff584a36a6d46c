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
        .set    VECTORS, TABLE + 384
        .set    ROWS, TABLE + 512
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
        test    rax, rax
        js      inside
        syscall
judge:  cmp     rax, [rbx + 56]                 # the floor of this call
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

# A row with a negative number is no call of that number. It reads pages where they are: it
# borrows eight vector registers, and gives them back before the next row. Or it uses the guard.
inside: cmp     rax, -3
        jne     reads
        mov     edi, [rip + GUARD]      # -3: ioctl on the guard, whose number nobody knows before
        mov     eax, 16
        syscall
        jmp     judge
reads:
        .irp    n, 0, 1, 2, 3, 4, 5, 6, 7
        movups  [rip + VECTORS + 16 * \n], xmm\n
        .endr
        cmp     rax, -1
        jne     digest

# -1: which pages differ, a bit each, lowest first.
# rdi = the first page, rsi = what the first should be, rdx = pages (1 to 64), r10 = how far
# behind that stands what the next should be.
        xor     eax, eax
        mov     r8d, 1
compare:
        pxor    xmm0, xmm0                      # all bits that differ somewhere in the page
        mov     r9, rsi
        mov     ecx, 64
line:   movdqa  xmm1, [rdi]
        movdqa  xmm2, [rdi + 16]
        movdqa  xmm3, [rdi + 32]
        movdqa  xmm4, [rdi + 48]
        pxor    xmm1, [r9]
        pxor    xmm2, [r9 + 16]
        pxor    xmm3, [r9 + 32]
        pxor    xmm4, [r9 + 48]
        por     xmm1, xmm2
        por     xmm3, xmm4
        por     xmm0, xmm1
        por     xmm0, xmm3
        add     rdi, 64
        add     r9, 64
        dec     ecx
        jnz     line
        pxor    xmm1, xmm1
        pcmpeqb xmm0, xmm1
        pmovmskb ecx, xmm0
        cmp     ecx, 0xffff
        je      same
        or      rax, r8
same:   add     r8, r8
        add     rsi, r10
        dec     rdx
        jnz     compare
        jmp     give

# -2: XXH3-64 with a seed of each page (xxhash.h: XXH3_hashLong_64b_withSeed).
# rdi = the first page, rsi = pages, rdx = where the digests go, r10 = the seed's secret,
# behind it the first accumulators.
        .macro  stripe
        .irp    n, 0, 1, 2, 3                   # XXH3_accumulate_512_sse2
        movdqa  xmm4, [rdi + 16 * \n]
        movdqu  xmm5, [rax + 16 * \n]
        pxor    xmm5, xmm4
        pshufd  xmm6, xmm5, 0x31
        pmuludq xmm5, xmm6
        pshufd  xmm4, xmm4, 0x4e
        paddq   xmm\n, xmm4
        paddq   xmm\n, xmm5
        .endr
        add     rdi, 64
        .endm
digest: mov     eax, 0x9e3779b1                 # XXH_PRIME32_1
        movd    xmm7, eax
        pshufd  xmm7, xmm7, 0
        lea     r9, [r10 + 128]                 # behind the secret of a block's last stripe
page:   .irp    n, 0, 1, 2, 3
        movdqu  xmm\n, [r10 + 192 + 16 * \n]
        .endr
        mov     rax, r10
        mov     ecx, 63                         # stripes but the last
block:  stripe
        add     rax, 8
        dec     ecx
        jz      last
        cmp     rax, r9
        jne     block
        .irp    n, 0, 1, 2, 3                   # XXH3_scrambleAcc_sse2
        movdqa  xmm4, xmm\n
        psrlq   xmm4, 47
        pxor    xmm\n, xmm4
        movdqu  xmm4, [r10 + 128 + 16 * \n]
        pxor    xmm\n, xmm4
        pshufd  xmm5, xmm\n, 0x31
        pmuludq xmm\n, xmm7
        pmuludq xmm5, xmm7
        psllq   xmm5, 32
        paddq   xmm\n, xmm5
        .endr
        mov     rax, r10
        jmp     block
last:   lea     rax, [r10 + 121]                # XXH_SECRET_LASTACC_START before its end
        stripe
        movabs  r11, 0x779b185ebca87000         # 4096 * XXH_PRIME64_1
        .irp    n, 0, 1, 2, 3                   # XXH3_mergeAccs
        movdqu  xmm4, [r10 + 11 + 16 * \n]
        pxor    xmm\n, xmm4
        movq    rax, xmm\n
        punpckhqdq xmm\n, xmm\n
        movq    r8, xmm\n
        mul     r8
        xor     rax, rdx
        add     r11, rax
        .endr
        mov     rax, r11                        # XXH3_avalanche
        shr     rax, 37
        xor     r11, rax
        movabs  rax, 0x165667919e3779f9
        imul    r11, rax
        mov     rax, r11
        shr     rax, 32
        xor     r11, rax
        mov     rax, [rbx + 24]
        mov     [rax], r11
        add     rax, 8
        mov     [rbx + 24], rax
        dec     rsi
        jnz     page
        xor     eax, eax
give:   .irp    n, 0, 1, 2, 3, 4, 5, 6, 7
        movups  xmm\n, [rip + VECTORS + 16 * \n]
        .endr
        jmp     judge
