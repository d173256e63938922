// Copies KV between a pool of blocks and contiguous memory in the wire's order: for each layer K,
// then V, each [tokens, row].

#include "kernels.h"

typedef struct {
    // Start of K of the first copied layer, in the pool.
    char *first_layer;
    // Distance from K to V of a layer, and from V to K of the next layer.
    int64_t side_bytes;
    // One token of K or V.
    int64_t row_bytes;
    int64_t block_size;
    // The sequence's blocks, from the first one copied.
    const int64_t *block_ids;
} kv_blocks;

// Bypasses the caches where possible: they cannot hold a whole chunk, and a write into them would
// first read the line from memory.
static void write_past_caches(char *to, const char *from, int64_t num_bytes) {
#if HAVE_AVX2
    int64_t head = -(intptr_t)to & 31;
    if (head > num_bytes) head = num_bytes;
    memcpy(to, from, head);
    int64_t i = head;
    for (; i + 128 <= num_bytes; i += 128) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)(from + i)), b = _mm256_loadu_si256((const __m256i *)(from + i + 32));
        const __m256i c = _mm256_loadu_si256((const __m256i *)(from + i + 64)), d = _mm256_loadu_si256((const __m256i *)(from + i + 96));
        _mm256_stream_si256((__m256i *)(to + i), a);
        _mm256_stream_si256((__m256i *)(to + i + 32), b);
        _mm256_stream_si256((__m256i *)(to + i + 64), c);
        _mm256_stream_si256((__m256i *)(to + i + 96), d);
    }
    memcpy(to + i, from + i, num_bytes - i);
#else
    memcpy(to, from, num_bytes);
#endif
}

// Copies tokens [token_begin, token_end) of `num_layers` layers, into or out of the pool.
void EXPORTED(copy_kv)(const kv_blocks *blocks, int64_t num_layers, int64_t token_begin, int64_t token_end, char *wire, int64_t into_pool) {
    for (int64_t side = 0; side < 2 * num_layers; side++) {
        char *rows = blocks->first_layer + side * blocks->side_bytes;
        for (int64_t token = token_begin; token < token_end;) {
            const int64_t block = token / blocks->block_size, offset = token % blocks->block_size;
            int64_t end = (block + 1) * blocks->block_size;
            if (end > token_end) end = token_end;
            char *row = rows + (blocks->block_ids[block] * blocks->block_size + offset) * blocks->row_bytes;
            const int64_t num_bytes = (end - token) * blocks->row_bytes;
            if (into_pool) write_past_caches(row, wire, num_bytes);
            else memcpy(wire, row, num_bytes);
            wire += num_bytes;
            token = end;
        }
    }
#if HAVE_AVX2
    if (into_pool) _mm_sfence();
#endif
}
