# int busy_round(const uint64_t *patterns, uint64_t *found, long loops, int wide)
# Loads every register from patterns, loops, stores every register to found.
# Words: 0..13 rax rbx rcx rdx rsi rdi rbp r8..r14, 14 red zone, 15 mxcsr (unused
# in patterns), then 32 vectors of 64 bytes, then k1..k7. Register r15 counts.
# Returns 1 when the carry flag, MXCSR and the whole red zone are as set.
        .intel_syntax noprefix
        .globl  busy_round
        .type   busy_round, @function
busy_round:
        push    rbx
        push    rbp
        push    r12
        push    r13
        push    r14
        push    r15
        mov     [rip + found], rsi
        mov     [rip + wide], ecx
        stmxcsr [rip + mxcsr_before]
        mov     dword ptr [rip + mxcsr_set], 0x7f80     # round toward zero
        ldmxcsr [rip + mxcsr_set]
        mov     r15, rdx
        mov     rax, [rdi + 14 * 8]
        .irp    n, 8,16,24,32,40,48,56,64,72,80,88,96,104,112,120,128
        mov     [rsp - \n], rax
        .endr
        lea     r8, [rdi + 128]
        cmp     ecx, 1
        jl      1f
        je      2f
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        vmovdqu64 zmm\n, [r8 + 64 * \n]
        .endr
        .irp    n, 1,2,3,4,5,6,7
        kmovw   k\n, [r8 + 2048 + 8 * \n]
        .endr
        jmp     3f
2:      .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        vmovdqu ymm\n, [r8 + 64 * \n]
        .endr
        jmp     3f
1:      .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        movdqu  xmm\n, [r8 + 64 * \n]
        .endr
3:      mov     rax, [rdi]
        mov     rbx, [rdi + 8]
        mov     rcx, [rdi + 16]
        mov     rdx, [rdi + 24]
        mov     rsi, [rdi + 32]
        mov     rbp, [rdi + 48]
        mov     r8, [rdi + 56]
        mov     r9, [rdi + 64]
        mov     r10, [rdi + 72]
        mov     r11, [rdi + 80]
        mov     r12, [rdi + 88]
        mov     r13, [rdi + 96]
        mov     r14, [rdi + 104]
        mov     rdi, [rdi + 40]
        stc
4:      dec     r15                             # leaves the carry flag alone
        jnz     4b
        setc    byte ptr [rip + carry]
        mov     r15, [rip + found]
        mov     [r15], rax
        mov     [r15 + 8], rbx
        mov     [r15 + 16], rcx
        mov     [r15 + 24], rdx
        mov     [r15 + 32], rsi
        mov     [r15 + 40], rdi
        mov     [r15 + 48], rbp
        mov     [r15 + 56], r8
        mov     [r15 + 64], r9
        mov     [r15 + 72], r10
        mov     [r15 + 80], r11
        mov     [r15 + 88], r12
        mov     [r15 + 96], r13
        mov     [r15 + 104], r14
        movzx   eax, byte ptr [rip + carry]
        mov     rbx, [r15 + 14 * 8]
        .irp    n, 8,16,24,32,40,48,56,64,72,80,88,96,104,112,120,128
        cmp     [rsp - \n], rbx
        jne     9f
        .endr
        stmxcsr [rip + mxcsr_found]
        mov     ecx, [rip + mxcsr_found]
        cmp     ecx, [rip + mxcsr_set]
        je      5f
9:      xor     eax, eax
5:      lea     r8, [r15 + 128]
        cmp     dword ptr [rip + wide], 1
        jl      6f
        je      7f
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        vmovdqu64 [r8 + 64 * \n], zmm\n
        .endr
        .irp    n, 1,2,3,4,5,6,7
        kmovw   [r8 + 2048 + 8 * \n], k\n
        .endr
        vzeroupper
        jmp     8f
7:      .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        vmovdqu [r8 + 64 * \n], ymm\n
        .endr
        vzeroupper
        jmp     8f
6:      .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        movdqu  [r8 + 64 * \n], xmm\n
        .endr
8:      ldmxcsr [rip + mxcsr_before]
        pop     r15
        pop     r14
        pop     r13
        pop     r12
        pop     rbp
        pop     rbx
        ret
        .bss
        .balign 8
found:  .quad   0
wide:   .long   0
mxcsr_before: .long 0
mxcsr_set: .long 0
mxcsr_found: .long 0
carry:  .byte   0
        .section .note.GNU-stack, "", @progbits
