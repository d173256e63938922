// Which instructions this process may use. variant_choice.py names the bits.
#include "threads.h"

#include <errno.h>

int64_t spent_ns;

int64_t nanoseconds_spent(void) { return spent_ns; }

#if defined(__x86_64__)
#include <cpuid.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };

static int64_t bit(int place, int is_set) { return (int64_t)(is_set != 0) << place; }

// The registers that the operating system saves for a thread.
static uint64_t saved_registers(void) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int saves(uint64_t saved, uint64_t wanted) { return (saved & wanted) == wanted; }

int64_t processor_features(void) {
    uint32_t a, b, c, d;
    int64_t found = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    uint64_t saved = c & bit_OSXSAVE ? saved_registers() : 0;
    found |= bit(1, c & bit_FMA);
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        found |= bit(0, b & bit_AVX2) | bit(3, b & bit_AVX512F) | bit(4, b & bit_AVX512BW) | bit(5, b & bit_AVX512DQ);
        found |= bit(6, b & bit_AVX512VL) | bit(7, c & 1 << 11) | bit(8, d & 1 << 24) | bit(9, d & 1 << 25) |
                 bit(13, d & 1 << 22);
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found |= bit(2, a & 1 << 4);
    }
    return found | bit(10, saves(saved, 0x6)) | bit(11, saves(saved, 0xe6)) | bit(12, saves(saved, 0x60000));
}

// Asks the kernel to let this process use tiles. Returns 0, or an error number.
int64_t request_tiles(void) {
#if defined(__linux__)
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 ? 0 : errno;
#else
    return ENOSYS;
#endif
}
#else
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

enum { ASIMD = 1 << 1, ASIMD_DOT_PRODUCT = 1 << 20, I8MM = 1 << 13 };  // the last one is of AT_HWCAP2

int64_t processor_features(void) {
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    return (int64_t)((first & ASIMD) != 0) << 14 | (int64_t)((first & ASIMD_DOT_PRODUCT) != 0) << 15 | (int64_t)((second & I8MM) != 0) << 16;
}
#elif defined(__aarch64__)
int64_t processor_features(void) { return (int64_t)1 << 14; }  // all have NEON
#else
int64_t processor_features(void) { return 0; }
#endif

int64_t request_tiles(void) { return ENOSYS; }
#endif
