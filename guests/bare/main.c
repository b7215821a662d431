/*
 * The bare-metal guest: writes to memory pages at a set rate, proves that they are whole,
 * and tells on the serial port. It needs few instructions for that, because some
 * machines emulate each of them. See guests/README.md for parameters and output.
 *
 * Time comes from counting timer interrupts, not from reading a clock: the count is in
 * the guest's memory, so it goes on where it was when the guest is restored elsewhere, and
 * no jump of a clock can stop the guest. A halt between rounds leaves the host's
 * processor to others.
 */
#include <stdbool.h>
#include <stdint.h>
#include "layout.h"

#define PAGE_SIZE 4096
#define AREA_START 0x1000000            /* 16 MiB: the pages that are written to */
#define STAMPS_START 0x200000           /* 2 MiB: what each page must hold */
#define ORDER_START 0x400000            /* 4 MiB: in which order pages are written to */
#define DEVICE_START 0x800000           /* 8 MiB: pages that a device writes to */
#define MOST_DEVICE_PAGES 1024
#define MOST_MEMORY 0x80000000u         /* beyond may lie the hole for devices */
#define MOST_PROCESSORS 2
#define MOST_MISMATCHES 16              /* kept per processor until they are printed */

#define SERIAL 0x3f8
#define FW_CFG_SELECT 0x510
#define FW_CFG_DATA 0x511
#define FW_CFG_DMA 0x518                /* the address, big-endian, of what to do */
#define FW_CFG_DMA_READ 0x02
#define FW_CFG_DMA_SKIP 0x04
#define FW_CFG_DMA_SELECT 0x08
#define FW_CFG_MEMORY_SIZE 0x03
#define FW_CFG_PROCESSORS 0x05
#define FW_CFG_FILES 0x19
#define TIMER_HZ 1193182

enum pattern { SEQUENTIAL, RANDOM, HOT };

static const char *const pattern_names[] = { "sequential", "random", "hot" };

struct mismatch {
    uint32_t page, have, want;
};

/* One per processor; on its own page, as the processors write to them all the time. */
struct worker {
    uint32_t first_page, area, pages;   /* its share */
    uint32_t next;                      /* position in the share, or in its order */
    volatile uint32_t round;
    volatile uint32_t bad;
    volatile uint32_t found, printed;   /* mismatches put into and taken out of the list */
    struct mismatch mismatches[MOST_MISMATCHES];
} __attribute__((aligned(PAGE_SIZE)));

extern char timer_entry[], wake_entry[], spurious_entry[], trampoline[], trampoline_end[];

volatile uint32_t ticks;
volatile uint32_t processors = 1;

static struct worker workers[MOST_PROCESSORS];
static volatile bool second_runs;
static enum pattern pattern = SEQUENTIAL;
static bool check = true;
static uint32_t device_pages;
static bool restart;                    /* the second processor does nothing but start, again and again */
static uint32_t restarts, lost_restarts;
static uint32_t ticks_per_second, ticks_per_round;      /* 0: no waiting between rounds */

/* ---- the machine ---- */

static inline void out(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t in(uint16_t port)
{
    uint8_t value;

    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint64_t read_tsc(void)
{
    uint64_t value;

    asm volatile("rdtsc" : "=A"(value));
    return value;
}

static inline void write_apic(uint32_t offset, uint32_t value)
{
    *(volatile uint32_t *)(LOCAL_APIC + offset) = value;
}

/* gcc may call these even in a program without a library. */
void *memcpy(void *to, const void *from, uint32_t size)
{
    void *start = to;

    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return start;
}

void *memset(void *to, int value, uint32_t size)
{
    void *start = to;

    asm volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
    return start;
}

static bool same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* ---- serial port ---- */

static void open_serial(void)
{
    out(SERIAL + 1, 0);                 /* no interrupts */
    out(SERIAL + 3, 0x80);
    out(SERIAL + 0, 1);                 /* 115200 baud */
    out(SERIAL + 1, 0);
    out(SERIAL + 3, 3);                 /* 8 bits, no parity, 1 stop bit */
    out(SERIAL + 2, 7);                 /* buffers of 16 bytes on */
    out(SERIAL + 4, 3);
}

static void print(const char *text)
{
    static uint32_t room;

    for (; *text; text++) {
        /* Ask once for 16 characters. Never wait for ever: a lost character is better. */
        if (room == 0) {
            for (int tries = 0; tries < 100000 && !(in(SERIAL + 5) & 0x20); tries++)
                ;
            room = 16;
        }
        out(SERIAL, *text);
        room--;
    }
}

static void print_number(uint64_t number)
{
    char digits[21];
    char *at = digits + 20;
    uint32_t high = number >> 32, low = number, rest;

    *at = '\0';
    do {
        /* 64 bit by 10 in two steps: gcc would call a library for it. */
        rest = high % 10;
        high /= 10;
        asm("divl %4" : "=a"(low), "=d"(rest) : "0"(low), "1"(rest), "r"(10));
        *--at = '0' + rest;
    } while (high || low);
    print(at);
}

static void print_pair(const char *name, uint64_t number)
{
    print(name);
    print_number(number);
}

/* ---- clocks ---- */

#define KVM_SIGNATURE 0x40000000
#define KVM_FEATURES 0x40000001
#define KVM_FEATURE_CLOCKSOURCE2 (1 << 3)
#define MSR_KVM_SYSTEM_TIME 0x4b564d01

/* What KVM writes, see Documentation/virt/kvm/x86/msr.rst of Linux. */
struct kvmclock {
    volatile uint32_t version;          /* odd while it is being changed */
    uint32_t unused;
    volatile uint64_t tsc_timestamp;
    volatile uint64_t system_time;
    volatile uint32_t tsc_to_system_mul;
    volatile int8_t tsc_shift;
    volatile uint8_t flags;
    uint8_t more[2];
} __attribute__((packed, aligned(32)));

/* At a place known to the host, which reads it in the file that holds the guest's memory. */
struct clocks {
    volatile uint32_t sequence;         /* odd while it is being changed */
    volatile uint32_t has_kvmclock;
    volatile uint64_t tsc;
    volatile uint64_t kvmclock_ns;
    volatile uint32_t tsc_backwards, kvmclock_backwards;
};

static struct clocks *const clocks = (struct clocks *)CLOCKS;
static struct kvmclock kvmclock __attribute__((aligned(PAGE_SIZE)));

static void ask_cpuid(uint32_t leaf, uint32_t *a, uint32_t *b)
{
    uint32_t c, d;

    asm volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(c), "=d"(d) : "0"(leaf), "2"(0));
}

static void start_clocks(void)
{
    uint32_t a, b;

    memset(clocks, 0, sizeof(*clocks));
    ask_cpuid(KVM_SIGNATURE, &a, &b);
    if (b != 0x4b4d564b)                /* "KVMK" */
        return;
    ask_cpuid(KVM_FEATURES, &a, &b);
    if (!(a & KVM_FEATURE_CLOCKSOURCE2))
        return;
    asm volatile("wrmsr" : : "c"(MSR_KVM_SYSTEM_TIME), "a"((uint32_t)&kvmclock | 1), "d"(0) : "memory");
    clocks->has_kvmclock = 1;
}

/* Nanoseconds by KVM's clock at the given count of the time stamp counter. */
static uint64_t kvmclock_ns(uint64_t *tsc)
{
    uint32_t version, multiplier;
    uint64_t delta, time;
    int8_t shift;

    do {
        version = kvmclock.version;
        asm volatile("" : : : "memory");
        *tsc = read_tsc();
        delta = *tsc - kvmclock.tsc_timestamp;
        time = kvmclock.system_time;
        multiplier = kvmclock.tsc_to_system_mul;
        shift = kvmclock.tsc_shift;
        asm volatile("" : : : "memory");
    } while ((version & 1) || version != kvmclock.version);
    if (shift < 0)
        delta >>= -shift;
    else
        delta <<= shift;
    return time + (delta >> 32) * multiplier + (((delta & 0xffffffff) * multiplier) >> 32);
}

static void look_at_clocks(void)
{
    uint64_t tsc, ns = 0;

    if (clocks->has_kvmclock)
        ns = kvmclock_ns(&tsc);
    else
        tsc = read_tsc();
    if (tsc < clocks->tsc) {
        clocks->tsc_backwards++;
        print_pair("clock: BACKWARDS tsc by ", clocks->tsc - tsc);
        print("\n");
    }
    if (ns < clocks->kvmclock_ns) {
        clocks->kvmclock_backwards++;
        print_pair("clock: BACKWARDS kvmclock by ", clocks->kvmclock_ns - ns);
        print("\n");
    }
    clocks->sequence++;
    asm volatile("" : : : "memory");
    clocks->tsc = tsc;
    clocks->kvmclock_ns = ns;
    asm volatile("" : : : "memory");
    clocks->sequence++;
}

/* ---- parameters ---- */

static void read_fw_cfg(void *to, uint32_t size)
{
    for (uint8_t *at = to; size; size--)
        *at++ = in(FW_CFG_DATA);
}

static void select_fw_cfg(uint16_t item)
{
    asm volatile("outw %0, %1" : : "a"(item), "Nd"((uint16_t)FW_CFG_SELECT));
}

/* Reads "-fw_cfg name=NAME,string=..." into text. Returns false when it was not given. */
static bool read_text(const char *name, char *text, uint32_t size)
{
    struct {
        uint32_t size;                  /* these are big-endian */
        uint16_t item, reserved;
        char name[56];
    } file;
    uint32_t files, length;

    select_fw_cfg(FW_CFG_FILES);
    read_fw_cfg(&files, sizeof(files));
    for (files = __builtin_bswap32(files); files; files--) {
        read_fw_cfg(&file, sizeof(file));
        if (!same(file.name, name))
            continue;
        length = __builtin_bswap32(file.size);
        if (length > size - 1)
            length = size - 1;
        select_fw_cfg(__builtin_bswap16(file.item));
        read_fw_cfg(text, length);
        text[length] = '\0';
        return true;
    }
    return false;
}

static void order_fw_cfg(uint32_t control, uint32_t length, uint32_t address)
{
    volatile struct {
        uint32_t control, length, address_high, address;
    } order = { __builtin_bswap32(control), __builtin_bswap32(length), 0, __builtin_bswap32(address) };

    asm volatile("outl %0, %1" : :
                 "a"(__builtin_bswap32((uint32_t)&order)), "Nd"((uint16_t)FW_CFG_DMA) : "memory");
}

/*
 * Has a device write to pages, without a store of the processor: what a configuration item
 * says, from another place of it in each round. It is over when the instruction is.
 */
static void write_by_device(uint32_t round)
{
    for (uint32_t page = 0; page < device_pages; page++) {
        order_fw_cfg(FW_CFG_FILES << 16 | FW_CFG_DMA_SELECT | FW_CFG_DMA_SKIP, (round * 7 + page) % 509, 0);
        order_fw_cfg(FW_CFG_DMA_READ, PAGE_SIZE, DEVICE_START + page * PAGE_SIZE);
    }
}

static uint32_t read_number(const char *name, uint32_t otherwise, uint32_t least, uint32_t most)
{
    char text[16];
    uint32_t value = 0;
    bool good = true;

    if (!read_text(name, text, sizeof(text)))
        return otherwise;
    for (char *at = text; *at; at++) {
        good = good && *at >= '0' && *at <= '9' && value < 100000000;
        value = value * 10 + (*at - '0');
    }
    if (good && text[0] && value >= least && value <= most)
        return value;
    print("ftd-bare: ");
    print(name);
    print("=");
    print(text);
    print_pair(" must be a number between ", least);
    print_pair(" and ", most);
    value = otherwise < least ? least : otherwise > most ? most : otherwise;
    print_pair(", using ", value);
    print("\n");
    return value;
}

static void read_pattern(void)
{
    char text[16];

    if (!read_text("opt/ftd/pattern", text, sizeof(text)))
        return;
    for (pattern = SEQUENTIAL; pattern <= HOT; pattern++)
        if (same(text, pattern_names[pattern]))
            return;
    print("ftd-bare: opt/ftd/pattern must be sequential, random or hot, using sequential\n");
    pattern = SEQUENTIAL;
}

/* ---- writing to pages ---- */

#define WORDS (PAGE_SIZE / sizeof(uint32_t))
#define PAGE_FACTOR 0x9e3779b1u
#define ROUND_FACTOR 0x01000193u
#define BLOCK 16

static uint32_t *const stamps = (uint32_t *)STAMPS_START;

static inline volatile uint32_t *words_of(uint32_t page)
{
    return (volatile uint32_t *)(AREA_START + page * PAGE_SIZE);
}

/*
 * What the first and the last word of a page hold. It is linear in both, so that the sum
 * over many pages can be known without looking at each.
 */
static inline uint32_t stamp_of(uint32_t page, uint32_t round)
{
    return page * PAGE_FACTOR + round * ROUND_FACTOR;
}

static void report(struct worker *worker, uint32_t page, uint32_t have, uint32_t want)
{
    struct mismatch *entry = &worker->mismatches[worker->found % MOST_MISMATCHES];

    worker->bad++;
    if (worker->found - worker->printed >= MOST_MISMATCHES)
        return;
    *entry = (struct mismatch){ page, have, want };
    worker->found++;
}

/* Any order: what a page must hold is kept for each page; 0 is "not yet written to". */
static void write_in_order(struct worker *worker, uint32_t round)
{
    const uint32_t *order = (uint32_t *)ORDER_START + worker->first_page;
    uint32_t next = worker->next, area = worker->area;
    bool checking = check;              /* in a register: each look at memory takes time */

    for (uint32_t left = worker->pages; left; left--) {
        uint32_t page = order[next];
        volatile uint32_t *words = words_of(page);

        if (++next == area)
            next = 0;
        if (checking) {
            uint32_t want = stamps[page], stamp = stamp_of(page, round) | 1;

            if (want && words[0] != want)
                report(worker, page, words[0], want);
            if (want && words[WORDS - 1] != want)
                report(worker, page, words[WORDS - 1], want);
            words[0] = stamp;
            words[WORDS - 1] = stamp;
            stamps[page] = stamp;
        } else {
            words[0] = round;
        }
    }
    worker->next = next;
}

/* One after the other, without a check: one word for each page, as quick as can be. */
static void write_plainly(struct worker *worker, uint32_t round)
{
    uint32_t left = worker->pages;

    while (left) {
        uint32_t count = worker->area - worker->next;
        volatile uint32_t *at = words_of(worker->first_page + worker->next);

        if (count > left)
            count = left;
        left -= count;
        worker->next += count;
        if (worker->next == worker->area)
            worker->next = 0;
        for (; count >= 4; count -= 4, at += 4 * WORDS) {
            at[0] = round;
            at[WORDS] = round;
            at[2 * WORDS] = round;
            at[3 * WORDS] = round;
        }
        for (; count; count--, at += WORDS)
            at[0] = round;
    }
}

/*
 * Every page in every round, with a check. Where each instruction is emulated, the check
 * would take most of the time: so the sum over 16 pages is compared, and only when it is
 * wrong are they looked at one by one. For the same reason odd rounds use the first word
 * of the pages and even rounds the last word, which then is two rounds old.
 */
static void write_every_page(struct worker *worker, uint32_t round)
{
    uint32_t word = round & 1 ? 0 : WORDS - 1;
    uint32_t page = worker->first_page, end = page + worker->pages;

    if (round == 1) {
        for (uint32_t i = page; i < end; i++) {
            words_of(i)[0] = stamp_of(i, 1);
            words_of(i)[WORDS - 1] = stamp_of(i, 0);
        }
        return;
    }
    while (page < end) {
        uint32_t count = end - page < BLOCK ? end - page : BLOCK;
        uint32_t want = count * stamp_of(page, round - 2) + count * (count - 1) / 2 * PAGE_FACTOR;
        uint32_t sum = 0;
        volatile uint32_t *at = words_of(page) + word;

        if (count == BLOCK) {
#pragma GCC unroll 16
            for (uint32_t i = 0; i < BLOCK; i++)
                sum += at[i * WORDS];
        } else {
            for (uint32_t i = 0; i < count; i++)
                sum += at[i * WORDS];
        }
        if (sum != want) {
            for (uint32_t i = 0; i < count; i++) {
                uint32_t stamp = stamp_of(page + i, round - 2);

                if (at[i * WORDS] != stamp)
                    report(worker, page + i, at[i * WORDS], stamp);
                at[i * WORDS] = stamp;
            }
        }
        if (count == BLOCK) {
#pragma GCC unroll 16
            for (uint32_t i = 0; i < BLOCK; i++)
                at[i * WORDS] += 2 * ROUND_FACTOR;
        } else {
            for (uint32_t i = 0; i < count; i++)
                at[i * WORDS] += 2 * ROUND_FACTOR;
        }
        page += count;
    }
}

/*
 * Lays down the order of writing. random: every page of the share once before any comes
 * twice, by a congruential sequence over the next power of two. hot: nine of ten writes
 * go to the first tenth of the share, one after the other, the tenth anywhere.
 */
static void make_order(struct worker *worker)
{
    uint32_t *order = (uint32_t *)ORDER_START + worker->first_page;
    uint32_t mask = 1, random = 0, hot = (worker->area + 9) / 10;

    while (mask < worker->area)
        mask <<= 1;
    mask -= 1;
    for (uint32_t i = 0; i < worker->area; i++) {
        if (pattern == SEQUENTIAL) {
            order[i] = worker->first_page + i;
        } else if (pattern == HOT && i % 10 != 9) {
            order[i] = worker->first_page + i % hot;
        } else {
            do
                random = (random * 1664525 + 1013904223) & mask;
            while (random >= worker->area);
            order[i] = worker->first_page + random;
        }
    }
}

static void one_round(struct worker *worker)
{
    uint32_t round = worker->round + 1;

    if (pattern == SEQUENTIAL && !check)
        write_plainly(worker, round);
    else if (pattern == SEQUENTIAL && worker->pages == worker->area)
        write_every_page(worker, round);
    else
        write_in_order(worker, round);
    if (worker == &workers[0] && device_pages)
        write_by_device(round);
    worker->round = round;
}

/* Halts until the next interrupt, but not when one came since the tick was read. */
static void wait_tick(uint32_t tick)
{
    asm volatile("cli");
    if (ticks == tick)
        asm volatile("sti; hlt");
    else
        asm volatile("sti");
}

/* ---- processors ---- */

static void set_vector(uint8_t vector, void *entry)
{
    static struct {
        uint16_t low, segment;
        uint16_t kind, high;
    } table[256];
    static struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) pointer;
    uint32_t address = (uint32_t)entry;

    table[vector].low = address;
    table[vector].segment = CODE;
    table[vector].kind = 0x8e00;
    table[vector].high = address >> 16;
    pointer.limit = sizeof(table) - 1;
    pointer.base = (uint32_t)table;
    asm volatile("lidt %0" : : "m"(pointer));
}

/* The first interrupt controller: only the timer, at TIMER_VECTOR. */
static void open_interrupts(void)
{
    out(0x20, 0x11);
    out(0x21, TIMER_VECTOR);
    out(0x21, 4);
    out(0x21, 1);
    out(0x21, 0xfe);
    out(0xa1, 0xff);
    set_vector(TIMER_VECTOR, timer_entry);
    set_vector(TIMER_VECTOR + 7, spurious_entry);
    set_vector(WAKE_VECTOR, wake_entry);
    set_vector(SPURIOUS_VECTOR, spurious_entry);
    write_apic(APIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
    write_apic(APIC_LINE_0, 0x700);     /* the controller's line reaches this processor */
}

static void start_timer(void)
{
    uint32_t divisor = TIMER_HZ / ticks_per_second;

    out(0x43, 0x34);                    /* periodic */
    out(0x40, divisor);
    out(0x40, divisor >> 8);
}

static void wait_ticks(uint32_t count)
{
    for (uint32_t start = ticks; ticks - start < count; )
        wait_tick(ticks);
}

/* Wakes the second processor the way the manual says: INIT, start-up, start-up. */
static bool start_second(void)
{
    memcpy((void *)TRAMPOLINE, trampoline, trampoline_end - trampoline);
    write_apic(APIC_COMMAND, 0xc4500);
    wait_ticks(2);
    for (int tries = 0; tries < 2 && !second_runs; tries++) {
        write_apic(APIC_COMMAND, 0xc4600 | TRAMPOLINE / PAGE_SIZE);
        wait_ticks(ticks_per_second / 5);
    }
    return second_runs;
}

/*
 * Once more, as soon as it runs. Nothing is waited for between INIT and start-up: if the first is lost, the
 * processor does not care about the second, and goes on where it was.
 */
static void restart_second(void)
{
    uint32_t start = ticks;

    second_runs = false;
    write_apic(APIC_COMMAND, 0xc4500);
    write_apic(APIC_COMMAND, 0xc4600 | TRAMPOLINE / PAGE_SIZE);
    while (!second_runs && ticks - start < 2 * ticks_per_second)
        asm volatile("pause");
    if (second_runs)
        restarts++;
    else
        lost_restarts++;
}

/* Prints where both processors are: ten lines a second at most, one per round when slower. */
static void tell(uint32_t tick)
{
    static uint32_t last_tick, last_rounds;
    uint32_t rounds = workers[0].round + workers[1].round, bad = 0;

    if (rounds == last_rounds || tick - last_tick < ticks_per_second / 10)
        return;
    last_tick = tick;
    last_rounds = rounds;

    for (uint32_t i = 0; i < processors; i++) {
        struct worker *worker = &workers[i];

        while (worker->printed != worker->found) {
            struct mismatch *entry = &worker->mismatches[worker->printed % MOST_MISMATCHES];

            print_pair("MISMATCH page ", entry->page);
            print_pair(" have ", entry->have);
            print_pair(" want ", entry->want);
            print("\n");
            worker->printed++;
        }
        bad += worker->bad;
    }
    print_pair("round ", workers[0].round);
    if (processors > 1)
        print_pair("/", workers[1].round);
    print_pair(" tsc ", clocks->tsc);
    print_pair(" bad ", bad);
    if (restart) {
        print_pair(" restarts ", restarts);
        print_pair(" lost ", lost_restarts);
    }
    print("\n");
}

static void work(struct worker *worker)
{
    uint32_t last = ticks;

    for (;;) {
        uint32_t tick = ticks;

        if (ticks_per_round == 0 || tick - last >= ticks_per_round) {
            /* What a slow machine does not manage in time is left out, not made up for. */
            last = tick - last >= 2 * ticks_per_round ? tick : last + ticks_per_round;
            one_round(worker);
        } else {
            wait_tick(tick);
        }
        /* Only the first processor prints. */
        if (worker == &workers[0]) {
            if (restart)
                restart_second();
            look_at_clocks();
            tell(tick);
        }
    }
}

void second_processor(void)
{
    set_vector(WAKE_VECTOR, wake_entry);        /* loads the table that the first filled */
    write_apic(APIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
    second_runs = true;
    asm volatile("sti");
    while (processors == 1)
        asm volatile("pause");
    work(&workers[1]);
}

static void share_out(uint32_t count, uint32_t pages, uint32_t area)
{
    for (uint32_t i = 0; i < count; i++) {
        struct worker *worker = &workers[i];

        /* What cannot be divided goes to the last one. */
        worker->first_page = area / count * i;
        worker->area = i + 1 < count ? area / count : area - worker->first_page;
        worker->pages = i + 1 < count ? pages / count : pages - pages / count * i;
        if (pattern != SEQUENTIAL || area != pages)
            make_order(worker);
    }
}

void boot_processor(void)
{
    uint64_t memory;
    uint32_t most, pages, area, rate;
    uint16_t present;

    open_serial();
    select_fw_cfg(FW_CFG_MEMORY_SIZE);
    read_fw_cfg(&memory, sizeof(memory));
    select_fw_cfg(FW_CFG_PROCESSORS);
    read_fw_cfg(&present, sizeof(present));
    if (memory > MOST_MEMORY)
        memory = MOST_MEMORY;
    if (memory < AREA_START + 16 * PAGE_SIZE) {
        print("ftd-bare: needs more than 16 MiB of memory\n");
        return;
    }
    most = ((uint32_t)memory - AREA_START) / PAGE_SIZE;

    pages = read_number("opt/ftd/pages", 64, 2, most);
    area = read_number("opt/ftd/area", pages, pages, most);
    rate = read_number("opt/ftd/rounds_per_second", 20, 0, 1000);
    check = read_number("opt/ftd/check", 1, 0, 1);
    device_pages = read_number("opt/ftd/device_pages", 0, 0, MOST_DEVICE_PAGES);
    restart = read_number("opt/ftd/restart", 0, 0, 1);
    read_pattern();

    /* At least 100 ticks a second, and a whole number of them for each round. */
    ticks_per_round = rate ? (99 + rate) / rate : 0;
    ticks_per_second = rate ? rate * ticks_per_round : 100;

    start_clocks();
    open_interrupts();
    start_timer();
    asm volatile("sti");
    if (present > MOST_PROCESSORS) {
        print_pair("ftd-bare: works with one or two processors, not ", present);
        print("\n");
    } else if (present == 2 && !start_second()) {
        print("ftd-bare: the second processor does not start\n");
    }

    memset(stamps, 0, area * sizeof(uint32_t));
    restart = restart && second_runs;
    share_out(second_runs && !restart ? 2 : 1, pages, area);
    if (second_runs && !restart)
        processors = 2;                 /* for this it waits, see second_processor() */
    print_pair("ftd-bare: ready pages=", pages);
    print_pair(" area=", area);
    print_pair(" rounds_per_second=", rate);
    print(" pattern=");
    print(pattern_names[pattern]);
    print_pair(" check=", check);
    print_pair(" processors=", processors);
    if (device_pages)
        print_pair(" device_pages=", device_pages);
    if (restart)
        print(" restart=1");
    print("\n");
    work(&workers[0]);
}
