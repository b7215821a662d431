/*
 * A firmware of 64 KiB that does nothing but start the guest it contains. In place of
 * SeaBIOS (-bios), it brings the guest up in milliseconds even where KVM emulates
 * every instruction. The processor sees it at 0xf0000 and just below 4 GiB.
 */
#include "layout.h"

        .text
        .code32
guest:
        .incbin "guest.bin"
        .align 4
guest_end:

        .org 0xff00
enter_32bit:
        mov $DATA, %eax
        mov %eax, %ds
        mov %eax, %es
        mov $0xf0000, %esi
        mov $LOAD_ADDRESS, %edi
        mov $(guest_end - guest) / 4, %ecx
        cld
        rep movsl
        mov $LOAD_ADDRESS, %eax
        jmp *%eax

        .org 0xff80
        .align 8
descriptor_table:
        .quad 0
        .quad 0x00cf9b000000ffff
        .quad 0x00cf93000000ffff
descriptor_table_pointer:
        .word descriptor_table_pointer - descriptor_table - 1
        .long 0xfff80

        .org 0xffd0
        .code16
enter_16bit:
        cli
        /* The code segment's base is still 0xffff0000: only offsets within it count. */
        lgdtl %cs:(0xff80 + 24)
        mov $1, %eax
        mov %eax, %cr0
        ljmpl $CODE, $0xfff00

        .org 0xfff0                     /* here the processor starts */
        jmp enter_16bit
        .org 0x10000

        .section .note.GNU-stack, "", @progbits
