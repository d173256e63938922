// Single operations for models that run in torch: a linear layer, and attention. decoder.c does
// without torch.
#include "attention.h"

#include <stdlib.h>

typedef struct {
    const float *x;
    int64_t num_rows, k;
    const quantized_rows *out;
} linear_args;

static void quantize_linear_task(void *argument, int64_t task) {
    const linear_args *args = argument;
    int64_t begin = task * ROWS_PER_TASK;
    int64_t count = args->num_rows - begin < ROWS_PER_TASK ? args->num_rows - begin : ROWS_PER_TASK;
    quantized_rows part = {args->out->values + begin * args->k, args->out->scales + begin * (args->k / GROUP)};
    quantize_rows(count, args->k, args->x + begin * args->k, &part);
}

// out = x W^T + bias. x: [num_rows][k], out: [num_rows][n]. Returns 0 if there is no
// memory for the quantized rows, else 1.
int64_t EXPORTED(run_linear)(const matrix *w, int64_t num_rows, const float *x, float *out) {
    static int64_t capacity;
    static quantized_rows quantized;
    if (w->kind == MATRIX_INT8) {
        int64_t wanted = padded_rows(num_rows) * w->k;
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
        linear_args args = {x, num_rows, w->k, &quantized};
        parallel_for((num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, quantize_linear_task, &args);
    }
    multiply(w, num_rows, x, &quantized, out, w->n, OUTPUT_STORE, NULL);
    return 1;
}
