// The forward pass of a llama-like decoder over a flat batch of tokens.
//
// A layer:  h += attention(norm(h)) Wo;  h += (silu(norm(h) Wg) * norm(h) Wu) Wd
// native_decoder.py selects such models; kernel_backend.py compares results with transformers'.
#include "attention.h"

#include <math.h>
#include <stdlib.h>
#include <time.h>

typedef struct {
    const float *attention_norm, *mlp_norm;  // [hidden]
    const float *query_norm, *key_norm;      // [head_dim] or NULL
    matrix qkv, output, gate_up, down;
    int64_t window;
    int64_t has_rope;
} decoder_layer;

typedef struct {
    int64_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim, rotary_dim;
    float norm_epsilon, attention_scale;
    const float *cosines, *sines;  // [max_positions][rotary_dim / 2]
    const float *embeddings;       // [vocab_size][hidden], or NULL: token_rows
    const decoder_layer *layers;
    const float *final_norm;
    matrix lm_head;
    matrix token_rows;  // bf16; may be lm_head
} decoder;

typedef struct {
    int64_t num_tokens, num_segments, num_tiles, num_logits;
    const int64_t *token_ids, *positions, *slots;  // [num_tokens]
    const segment *segments;
    const attention_tile *tiles;
    const int64_t *logit_rows;  // [num_logits]
    void *pool;                 // [num_layers][2][num_blocks][block_size][num_kv_heads][a head's row]
    int64_t kv_dtype, num_blocks, block_size;
    float *logits;  // [num_logits][vocab_size]
} decoder_step;

// Rows of a step between the operations. One per process; grows with the largest step.
static struct {
    int64_t num_bytes;
    char *memory;
} arena;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

typedef struct {
    float *hidden, *normed, *qkv, *attended, *activated;
    quantized_rows quantized;
} rows;

static char *reserve(char **at, int64_t num_bytes) {
    char *begin = *at;
    *at += (num_bytes + 63) / 64 * 64;
    return begin;
}

static int64_t most_prepared_bytes(const decoder *d, int64_t num_tokens) {
    const decoder_layer *layer = d->layers;
    const matrix *products[] = {&layer->qkv, &layer->output, &layer->gate_up, &layer->down, &d->lm_head};
    int64_t most = 0;
    for (int i = 0; i < 5; i++)
        if (prepared_bytes(products[i], num_tokens) > most) most = prepared_bytes(products[i], num_tokens);
    return most;
}

// Returns the size if memory is NULL, else places the arrays.
static int64_t place_rows(const decoder *d, int64_t num_tokens, char *memory, rows *r) {
    char *at = memory;
    int64_t widest = d->intermediate > d->hidden ? d->intermediate : d->hidden;
    int64_t attention = d->num_heads * d->head_dim;
    if (attention > widest) widest = attention;
    r->hidden = (float *)reserve(&at, num_tokens * d->hidden * 4);
    r->normed = (float *)reserve(&at, num_tokens * d->hidden * 4);
    r->qkv = (float *)reserve(&at, num_tokens * d->layers[0].qkv.n * 4);
    r->attended = (float *)reserve(&at, num_tokens * attention * 4);
    r->activated = (float *)reserve(&at, num_tokens * d->intermediate * 4);
    r->quantized.values = (uint8_t *)reserve(&at, most_prepared_bytes(d, num_tokens));
    r->quantized.scales = (float *)reserve(&at, padded_rows(num_tokens) * (widest / GROUP + 1) * 4);
    return at - memory;
}

static int get_rows(const decoder *d, int64_t num_tokens, rows *r) {
    int64_t num_bytes = place_rows(d, num_tokens, NULL, r);
    if (num_bytes > arena.num_bytes) {
        free(arena.memory);
        arena.memory = aligned_alloc(64, (num_bytes + 63) / 64 * 64);
        arena.num_bytes = arena.memory == NULL ? 0 : num_bytes;
        if (arena.memory == NULL) return 0;
    }
    place_rows(d, num_tokens, arena.memory, r);
    return 1;
}

static void norm_row(const float *x, const float *weight, float epsilon, int64_t n, float *out) {
    f32x8 squares = splat8(0);
    for (int64_t i = 0; i < n; i += 8) squares = fma8(load8(x + i), load8(x + i), squares);
    float factor = 1.0f / sqrtf(sum_lanes(squares) / (float)n + epsilon);
    int64_t i = 0;
    for (; i + WIDE <= n; i += WIDE) store_wide(out + i, load_wide(x + i) * splat_wide(factor) * load_wide(weight + i));
    for (; i < n; i += 8) store8(out + i, load8(x + i) * splat8(factor) * load8(weight + i));
}

// ---------------------------------------------------------------- row-wise operations

typedef struct {
    const decoder *d;
    const decoder_layer *layer;
    const decoder_step *step;
    const rows *r;
    const float *from;     // of norms and quantization
    const float *weight;   // of the norm
    int64_t num_rows, width;
    const matrix *next;    // input for this product
    kv_layer kv;
} row_args;

static void for_rows(row_args *args, task_function function) {
    int64_t num_tasks = (args->num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
    if (args->num_rows <= ROWS_PER_TASK)
        for (int64_t i = 0; i < num_tasks; i++) function(args, i);
    else
        parallel_for(num_tasks, function, args);
}

static void rows_of(const row_args *args, int64_t task, int64_t *begin, int64_t *end) {
    *begin = task * ROWS_PER_TASK;
    *end = *begin + ROWS_PER_TASK < args->num_rows ? *begin + ROWS_PER_TASK : args->num_rows;
}

static void norm_task(void *argument, int64_t task) {
    const row_args *args = argument;
    int64_t begin, end;
    rows_of(args, task, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        norm_row(args->from + i * args->width, args->weight, args->d->norm_epsilon, args->width, args->r->normed + i * args->width);
    prepare_rows(args->next, begin, end, args->r->normed, &args->r->quantized);
}

static void prepare_task(void *argument, int64_t task) {
    const row_args *args = argument;
    int64_t begin, end;
    rows_of(args, task, &begin, &end);
    prepare_rows(args->next, begin, end, args->from, &args->r->quantized);
}

// (a, b) by an angle: a cos - b sin, and b cos + a sin.
static void rotate(float *x, const float *cosines, const float *sines, int64_t half) {
    int64_t i = 0;
    for (; i + WIDE <= half; i += WIDE) {
        f32w a = load_wide(x + i), b = load_wide(x + i + half), c = load_wide(cosines + i), s = load_wide(sines + i);
        store_wide(x + i, fma_wide(a, c, -(b * s)));
        store_wide(x + i + half, fma_wide(b, c, a * s));
    }
    for (; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = fma1(a, cosines[i], -(b * sines[i]));
        x[i + half] = fma1(b, cosines[i], a * sines[i]);
    }
}

// Normalizes and rotates queries and keys, and writes keys and values into the pool.
static void rope_task(void *argument, int64_t task) {
    const row_args *args = argument;
    const decoder *d = args->d;
    int64_t begin, end, stride = args->layer->qkv.n, half = d->rotary_dim / 2;
    rows_of(args, task, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        float *row = args->r->qkv + t * stride;
        for (int64_t h = 0; h < d->num_heads + d->num_kv_heads; h++) {
            float *x = row + h * d->head_dim;
            const float *norm = h < d->num_heads ? args->layer->query_norm : args->layer->key_norm;
            if (norm != NULL) norm_row(x, norm, d->norm_epsilon, d->head_dim, x);
            if (args->layer->has_rope)
                rotate(x, d->cosines + args->step->positions[t] * half, d->sines + args->step->positions[t] * half, half);
        }
    }
    const float *keys = args->r->qkv + begin * stride + d->num_heads * d->head_dim;
    write_kv(&args->kv, end - begin, args->step->slots + begin, keys, keys + d->num_kv_heads * d->head_dim, stride);
}

// ---------------------------------------------------------------- the pass

static kv_layer kv_of(const decoder *d, const decoder_step *s, int64_t layer) {
    int64_t side = s->num_blocks * s->block_size * d->num_kv_heads * kv_row_bytes(s->kv_dtype, d->head_dim);
    char *pool = s->pool;
    return (kv_layer){pool + 2 * layer * side, pool + (2 * layer + 1) * side, s->kv_dtype, s->block_size, d->num_kv_heads, d->head_dim};
}

static void run_attention_part(const decoder *d, const decoder_step *s, const rows *r, int64_t number) {
    const decoder_layer *layer = &d->layers[number];
    row_args args = {
        .d = d, .layer = layer, .step = s, .r = r, .num_rows = s->num_tokens, .from = r->hidden, .weight = layer->attention_norm,
        .width = d->hidden, .next = &layer->qkv, .kv = kv_of(d, s, number)};
    for_rows(&args, norm_task);
    multiply(&layer->qkv, s->num_tokens, r->normed, &r->quantized, r->qkv, layer->qkv.n, OUTPUT_STORE, &layer->output);
    for_rows(&args, rope_task);
}

static void run_rest_of_layer(const decoder *d, const decoder_step *s, const rows *r, int64_t number) {
    const decoder_layer *layer = &d->layers[number];
    kv_layer kv = kv_of(d, s, number);
    attention_call call = {
        .segments = s->segments, .tiles = s->tiles, .num_tiles = s->num_tiles, .queries = r->qkv, .query_stride = layer->qkv.n,
        .num_heads = d->num_heads, .scale = d->attention_scale, .window = layer->window, .out = r->attended};
    attend(&call, &kv);
    row_args args = {
        .d = d, .layer = layer, .step = s, .r = r, .num_rows = s->num_tokens, .from = r->attended,
        .width = d->num_heads * d->head_dim, .next = &layer->output};
    if (layer->output.kind != MATRIX_F32) for_rows(&args, prepare_task);
    multiply(&layer->output, s->num_tokens, r->attended, &r->quantized, r->hidden, d->hidden, OUTPUT_ADD, &layer->gate_up);
    args.from = r->hidden;
    args.weight = layer->mlp_norm;
    args.width = d->hidden;
    args.next = &layer->gate_up;
    for_rows(&args, norm_task);
    multiply(&layer->gate_up, s->num_tokens, r->normed, &r->quantized, r->activated, d->intermediate, OUTPUT_GATED, &layer->down);
    args.from = r->activated;
    args.width = d->intermediate;
    args.next = &layer->down;
    if (layer->down.kind != MATRIX_F32) for_rows(&args, prepare_task);
    const matrix *following = number + 1 < d->num_layers ? &layer[1].qkv : &d->lm_head;
    multiply(&layer->down, s->num_tokens, r->activated, &r->quantized, r->hidden, d->hidden, OUTPUT_ADD, following);
}

static void embed(const decoder *d, const decoder_step *s, const rows *r) {
    for (int64_t t = 0; t < s->num_tokens; t++)
        if (d->embeddings != NULL)
            memcpy(r->hidden + t * d->hidden, d->embeddings + s->token_ids[t] * d->hidden, d->hidden * sizeof(float));
        else
            unpack_row_bf16(&d->token_rows, s->token_ids[t], r->hidden + t * d->hidden);
}

static void compute_logits(const decoder *d, const decoder_step *s, const rows *r) {
    // Moves the wanted rows to the front. Their numbers ascend, so none is overwritten too early.
    for (int64_t i = 0; i < s->num_logits; i++)
        memmove(r->hidden + i * d->hidden, r->hidden + s->logit_rows[i] * d->hidden, d->hidden * 4);
    row_args args = {
        .d = d, .step = s, .r = r, .num_rows = s->num_logits, .from = r->hidden, .weight = d->final_norm, .width = d->hidden,
        .next = &d->lm_head};
    for_rows(&args, norm_task);
    multiply(&d->lm_head, s->num_logits, r->normed, &r->quantized, s->logits, d->lm_head.n, OUTPUT_STORE, NULL);
}

// Runs layers [layer_begin, layer_end), embeddings before the first, logits after the last. Nothing
// else may run between two calls of one step. Returns 0 if there is no memory for the rows, else 1.
int64_t EXPORTED(run_decoder)(const decoder *d, const decoder_step *s, int64_t layer_begin, int64_t layer_end) {
    rows r;
    if (!get_rows(d, s->num_tokens, &r)) return 0;
    int64_t begin_ns = now_ns();
    if (layer_begin == 0) embed(d, s, &r);
    for (int64_t layer = layer_begin; layer < layer_end; layer++) {
        run_attention_part(d, s, &r, layer);
        run_rest_of_layer(d, s, &r, layer);
    }
    if (layer_end == d->num_layers && s->num_logits > 0) compute_logits(d, s, &r);
    spent_ns += now_ns() - begin_ns;
    return 1;
}
