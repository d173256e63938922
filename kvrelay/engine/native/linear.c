// Single operations for models that run in torch: a linear layer, and attention. decoder.c does
// without torch.
#include "attention.h"

#include <stdlib.h>

enum { ROWS_PER_TASK = 16 };

typedef struct {
    const float *x;
    int64_t num_rows, k;
    const quantized_rows *out;
} quantize_args;

static void quantize_task(void *argument, int64_t task) {
    const quantize_args *args = argument;
    int64_t begin = task * ROWS_PER_TASK;
    int64_t count = args->num_rows - begin < ROWS_PER_TASK ? args->num_rows - begin : ROWS_PER_TASK;
    quantized_rows part = {args->out->values + begin * args->k, args->out->scales + begin * (args->k / GROUP)};
    quantize_rows(count, args->k, args->x + begin * args->k, &part);
}

// out = x W^T + bias. x: [num_rows][k], out: [num_rows][n]. Returns 0 if there is no
// memory for the quantized rows, else 1.
int64_t run_linear(const matrix *w, int64_t num_rows, const float *x, float *out) {
    static int64_t capacity;
    static quantized_rows quantized;
    if (w->kind == MATRIX_INT8) {
        if (num_rows * w->k > capacity) {
            free(quantized.values);
            free(quantized.scales);
            capacity = num_rows * w->k;
            quantized.values = malloc(capacity);
            quantized.scales = malloc(capacity / GROUP * sizeof(float));
            if (quantized.values == NULL || quantized.scales == NULL) {
                capacity = 0;
                return 0;
            }
        }
        quantize_args args = {x, num_rows, w->k, &quantized};
        parallel_for((num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, quantize_task, &args);
    }
    multiply(w, num_rows, x, &quantized, out, w->n, OUTPUT_STORE, NULL);
    return 1;
}
