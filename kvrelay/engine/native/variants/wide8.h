// Variants whose widest vectors have eight floats, and whose tiles have 6 x 16 sums.
#define WIDE 8

#define MAX_ROWS 6  // their sums fill 12 of 16 registers
#define MAX_PANELS 1
#define ROWS_PER_BLOCK 264
#define TASK_WORK 2000000

#define MAX_ROWS_INT8 6
#define ROWS_PER_BLOCK_INT8 264
#define ROW_BLOCK 1
#define TASK_WORK_INT8 4000000

#define MAX_PARTS 2  // their sums take 8 of 16 registers
#define PARTS_PANELS 1
#define TASK_WORK_BF16 1000000

typedef f32x8 f32w;
typedef i32x8 i32w;

#define load_wide load8
#define store_wide store8
#define splat_wide splat8
#define fma_wide fma8
#define max_wide max8
#define max_lanes_wide max_lanes

// Adds to eight sums, in the order of the numbers.
ALWAYS_INLINE f32x8 add_to_eight(f32x8 sums, const f32w *v) { return sums + v[0]; }

ALWAYS_INLINE void transpose_f32(const void *const *from, f32w to[8]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) to[i] = load8(from[i]);
    transpose8(to);
}

ALWAYS_INLINE void transpose_bf16(const void *const *from, f32w to[8]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) to[i] = widen_bf16(from[i]);
    transpose8(to);
}
