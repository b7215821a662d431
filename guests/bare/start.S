/*
 * Entry points of the bare-metal guest: from a multiboot loader or from firmware.S, from
 * the timer, and of the second processor.
 */
#include "layout.h"

        .section .start, "ax"
        .code32
        .globl start
start:
        jmp 1f

        /* QEMU's -kernel finds this header and loads the ELF file by it. */
        .align 4
        .set MULTIBOOT_MAGIC, 0x1badb002
        .long MULTIBOOT_MAGIC, 0, -MULTIBOOT_MAGIC

1:      cli
        cld
        lgdt descriptor_table_pointer
        ljmp $CODE, $1f
1:      mov $DATA, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        mov $stack_top, %esp

        xor %eax, %eax
        mov $bss_start, %edi
        mov $bss_end, %ecx
        sub %edi, %ecx
        shr $2, %ecx
        rep stosl
        call boot_processor
1:      hlt
        jmp 1b

        .text
        /*
         * iret in three instructions, because KVM's instruction emulator has no iret for
         * protected mode. An interrupt before the last of them does no harm.
         */
        .macro return_from_interrupt
        pushl 8(%esp)
        popfl
        ret $8
        .endm

        /*
         * Timer, first processor: count, tell the interrupt controller, and wake the
         * second processor, to which the timer is not wired.
         */
        .globl timer_entry
timer_entry:
        push %eax
        incl ticks
        mov $0x20, %al
        outb %al, $0x20
        cmpl $1, processors
        jbe 1f
        movl $WAKE_COMMAND, LOCAL_APIC + APIC_COMMAND
1:      pop %eax
        return_from_interrupt

        /* The wake-up, second processor: it only has to end a halt. */
        .globl wake_entry
wake_entry:
        movl $0, LOCAL_APIC + APIC_END_OF_INTERRUPT
        return_from_interrupt

        /* An interrupt that was gone before it was fetched: nothing to acknowledge. */
        .globl spurious_entry
spurious_entry:
        return_from_interrupt

        /*
         * Copied to TRAMPOLINE, below 1 MiB, where the second processor starts in
         * 16-bit mode with the code segment TRAMPOLINE / 16.
         */
        .globl trampoline, trampoline_end
        .code16
trampoline:
        cli
        mov %cs, %ax
        mov %ax, %ds
        lgdtl trampoline_pointer - trampoline
        mov $1, %eax
        mov %eax, %cr0
        ljmpl $CODE, $second_start
        .align 4
trampoline_pointer:
        .word descriptor_table_end - descriptor_table - 1
        .long descriptor_table
trampoline_end:

        .code32
second_start:
        mov $DATA, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        mov $second_stack_top, %esp
        call second_processor
1:      hlt
        jmp 1b

        .data
        .align 8
descriptor_table:                       /* flat: all of memory, code and data */
        .quad 0
        .quad 0x00cf9b000000ffff
        .quad 0x00cf93000000ffff
descriptor_table_end:
        .align 4
descriptor_table_pointer:
        .word descriptor_table_end - descriptor_table - 1
        .long descriptor_table

        .bss
        .align 16
        .skip 4096
stack_top:
        .skip 4096
second_stack_top:

        .section .note.GNU-stack, "", @progbits
