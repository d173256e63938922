// Single operations for models that run in torch: a linear layer, and attention. decoder.c does
// without torch.
#include "attention.h"

#include <stdlib.h>

typedef struct {
    const matrix *w;
    const float *x;
    int64_t num_rows;
    const quantized_rows *out;
} linear_args;

static void prepare_linear_task(void *argument, int64_t task) {
    const linear_args *args = argument;
    int64_t begin = task * ROWS_PER_TASK, end = begin + ROWS_PER_TASK;
    prepare_rows(args->w, begin, end < args->num_rows ? end : args->num_rows, args->x, args->out);
}

// out = x W^T + bias. x: [num_rows][k], out: [num_rows][n]. Returns 0 if there is no
// memory for the prepared rows, else 1.
int64_t EXPORTED(run_linear)(const matrix *w, int64_t num_rows, const float *x, float *out) {
    static int64_t capacity;
    static quantized_rows quantized;
    int64_t wanted = prepared_bytes(w, num_rows);
    if (wanted > 0) {
        if (wanted > capacity) {
            free(quantized.values);
            free(quantized.scales);
            capacity = wanted;  // a multiple of GROUP
            quantized.values = aligned_alloc(64, capacity);
            quantized.scales = malloc(capacity / GROUP * sizeof(float));
            if (quantized.values == NULL || quantized.scales == NULL) {
                capacity = 0;
                return 0;
            }
        }
        linear_args args = {w, x, num_rows, &quantized};
        parallel_for((num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, prepare_linear_task, &args);
    }
    multiply(w, num_rows, x, &quantized, out, w->n, OUTPUT_STORE, NULL);
    return 1;
}
