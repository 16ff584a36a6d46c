# The loop of vmdedup/linux/syscall_batch.py, as source: the tests assemble it and compare.
# On entry: rdi = first row, rsi = behind the last row (System V x86-64).
        .intel_syntax noprefix
        push    rbx
        push    rbp
        sub     rsp, 8                  # a function expects an aligned stack
        mov     rbx, rdi
        mov     rbp, rsi
next:   cmp     rbx, rbp
        je      done
        mov     rax, [rbx]
        mov     rdi, [rbx + 8]
        mov     rsi, [rbx + 16]
        mov     rdx, [rbx + 24]
        mov     r10, [rbx + 32]
        mov     r8, [rbx + 40]
        mov     r9, [rbx + 48]
        cmp     rax, 4096
        jae     function
        syscall
result: mov     [rbx + 56], rax
        add     rbx, 64
        jmp     next
function:
        mov     rcx, r10                # the fourth argument of a function
        call    rax
        jmp     result
done:   add     rsp, 8
        pop     rbp
        pop     rbx
        ret
