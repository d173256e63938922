// Eight floats in a register of AVX2.
#include <immintrin.h>

#define HAVE_AVX2 1

ALWAYS_INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

ALWAYS_INLINE f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) { return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

ALWAYS_INLINE f32x8 max8(f32x8 a, f32x8 b) { return (f32x8)_mm256_max_ps((__m256)a, (__m256)b); }

ALWAYS_INLINE f32x8 swap_lanes(f32x8 v, const int distance) {
    if (distance == 4) return (f32x8)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1);
    return (f32x8)(distance == 2 ? _mm256_permute_ps((__m256)v, 0x4e) : _mm256_permute_ps((__m256)v, 0xb1));
}

ALWAYS_INLINE f32x8 widen_int8(const void *from) { return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from))); }

ALWAYS_INLINE f32x8 widen_bf16(const void *from) {
    return (f32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 16);
}

// Transposes 8 x 8.
ALWAYS_INLINE void transpose8(f32x8 r[8]) {
    __m256 t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = (f32x8)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = (f32x8)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

ALWAYS_INLINE int32_t four_values(const uint8_t *values) {
    int32_t four;
    memcpy(&four, values, 4);
    return four;
}

// Within a region that flushes, numbers below the smallest normal one count as 0.
typedef uint32_t flush_state;

ALWAYS_INLINE flush_state begin_flushing(void) {
    enum { FLUSH_RESULTS = 1 << 15, FLUSH_INPUTS = 1 << 6 };
    flush_state before = _mm_getcsr();
    _mm_setcsr(before | FLUSH_RESULTS | FLUSH_INPUTS);
    return before;
}

ALWAYS_INLINE int end_flushing(flush_state before) {
    _mm_setcsr(before);
    return 0;
}

#define flushed_input(x) (x)
#define fma_flushing fma_wide
#define add_flushing(a, b) ((a) + (b))
