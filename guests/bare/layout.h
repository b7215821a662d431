/* What start.S, firmware.S and main.c have in common. */
#ifndef LAYOUT_H
#define LAYOUT_H

#define LOAD_ADDRESS 0x100000   /* keep equal to the one in layout.ld */
#define TRAMPOLINE 0x8000       /* of the second processor: a page below 1 MiB */

#define CLOCKS 0x9000           /* a page that tells the clocks to who reads the guest's memory */

/* Segments, as offsets in the descriptor table. */
#define CODE 0x08
#define DATA 0x10

/* Registers of the local APIC. */
#define LOCAL_APIC 0xfee00000
#define APIC_END_OF_INTERRUPT 0xb0
#define APIC_SPURIOUS 0xf0
#define APIC_COMMAND 0x300
#define APIC_COMMAND_TARGET 0x310
#define APIC_LINE_0 0x350

/* Interrupts. */
#define TIMER_VECTOR 0x20
#define WAKE_VECTOR 0x40
#define SPURIOUS_VECTOR 0xff
#define WAKE_COMMAND (0xc4000 | WAKE_VECTOR)    /* to all other processors */

#endif
