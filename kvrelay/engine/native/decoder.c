// The forward pass of a decoder over a flat batch of tokens.
//
// A layer:  h += attention(norm(h)) Wo;  h += mlp(norm(h)) Wd
// Its description says which norms there are, also behind a product, and what the MLP does.
// decoder_weights.py makes it; kernel_backend.py compares results with transformers'.
#include "decoder.h"

#include <math.h>
#include <stdlib.h>
#include <time.h>

// Memory of a step's rows. One per process; grows with the largest step.
static struct {
    int64_t num_bytes;
    char *memory;
} arena;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t most_prepared_bytes(const decoder *d, int64_t num_tokens) {
    int64_t most = prepared_bytes(&d->lm_head, num_tokens);
    for (const decoder_layer *layer = d->layers; layer < d->layers + d->num_layers; layer++) {
        const matrix *products[] = {&layer->qkv, &layer->output, &layer->experts->up, &layer->experts->down};
        for (int i = 0; i < 4; i++)
            if (prepared_bytes(products[i], num_tokens) > most) most = prepared_bytes(products[i], num_tokens);
    }
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
    place_experts(d, num_tokens, &at, r);
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

static void norm_row(const float *x, const row_norm *norm, float *out) {
    int64_t n = norm->width, i = 0;
    const float *weight = norm->weight;
    f32x8 squares = splat8(0);
    for (; i < n; i += 8) squares = fma8(load8(x + i), load8(x + i), squares);
    float factor = 1.0f / sqrtf(sum_lanes(squares) / (float)n + norm->epsilon);
    for (i = 0; i + WIDE <= n; i += WIDE) store_wide(out + i, load_wide(x + i) * splat_wide(factor) * load_wide(weight + i));
    for (; i < n; i += 8) store8(out + i, load8(x + i) * splat8(factor) * load8(weight + i));
}

static void center_and_norm_row(const float *x, const row_norm *norm, float *out) {
    int64_t n = norm->width;
    f32x8 sum = splat8(0), squares = splat8(0);
    for (int64_t i = 0; i < n; i += 8) sum += load8(x + i);
    f32x8 mean = splat8(sum_lanes(sum) / (float)n);
    for (int64_t i = 0; i < n; i += 8) squares = fma8(load8(x + i) - mean, load8(x + i) - mean, squares);
    f32x8 factor = splat8(1.0f / sqrtf(sum_lanes(squares) / (float)n + norm->epsilon));
    for (int64_t i = 0; i < n; i += 8)
        store8(out + i, fma8((load8(x + i) - mean) * factor, load8(norm->weight + i), load8(norm->bias + i)));
}

// Normalizes each norm->width of x[n]; out may be x.
static void apply_norm(const float *x, int64_t n, const row_norm *norm, float *out) {
    for (int64_t i = 0; i < n; i += norm->width)
        if (norm->bias == NULL)
            norm_row(x + i, norm, out + i);
        else
            center_and_norm_row(x + i, norm, out + i);
}

// ---------------------------------------------------------------- row-wise operations

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
        apply_norm(args->from + i * args->width, args->width, args->norm, args->r->normed + i * args->width);
    prepare_rows(args->next, begin, end, args->r->normed, &args->r->quantized);
}

static void prepare_task(void *argument, int64_t task) {
    const row_args *args = argument;
    int64_t begin, end;
    rows_of(args, task, &begin, &end);
    prepare_rows(args->next, begin, end, args->from, &args->r->quantized);
}

// hidden += norm(normed)
static void add_normed_task(void *argument, int64_t task) {
    const row_args *args = argument;
    int64_t begin, end, width = args->d->hidden;
    rows_of(args, task, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        float *normed = args->r->normed + t * width, *hidden = args->r->hidden + t * width;
        apply_norm(normed, width, args->norm, normed);
        for (int64_t i = 0; i < width; i += 8) store8(hidden + i, load8(hidden + i) + load8(normed + i));
    }
}

static void embed_token(const decoder *d, int64_t id, float *out) {
    if (d->embeddings != NULL) {
        const float *from = d->embeddings + id * d->hidden;
        for (int64_t i = 0; i < d->hidden; i += 8) store8(out + i, load8(from + i) * splat8(d->embedding_scale));
        return;
    }
    if (d->narrow_embeddings != NULL) {
        const uint16_t *from = d->narrow_embeddings + id * d->hidden;
        for (int64_t i = 0; i < d->hidden; i += 8) store8(out + i, widen_bf16(from + i) * splat8(d->embedding_scale));
        return;
    }
    unpack_row_bf16(&d->token_rows, id, out);
    const f32w scale = splat_wide(d->embedding_scale);  // the module multiplies in bf16
    for (int64_t i = 0; i < d->hidden; i += WIDE) store_wide(out + i, (f32w)round_to_bf16(load_wide(out + i) * scale));
}

static void embed_task(void *argument, int64_t task) {
    const row_args *args = argument;
    const decoder *d = args->d;
    int64_t begin, end;
    rows_of(args, task, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        float *hidden = args->r->hidden + t * d->hidden;
        embed_token(d, args->step->token_ids[t], hidden);
        if (d->position_embeddings == NULL) continue;
        const float *position = d->position_embeddings + args->step->positions[t] * d->hidden;
        for (int64_t i = 0; i < d->hidden; i += 8) store8(hidden + i, load8(hidden + i) + load8(position + i));
    }
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
static void write_kv_task(void *argument, int64_t task) {
    const row_args *args = argument;
    const decoder *d = args->d;
    const decoder_layer *layer = args->layer;
    int64_t begin, end, stride = layer->qkv.n, half = d->rotary_dim / 2;
    int64_t num_queries = d->num_heads * d->head_dim, num_keys = d->num_kv_heads * d->head_dim;
    rows_of(args, task, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        float *row = args->r->qkv + t * stride;
        if (layer->query_norm.weight != NULL) apply_norm(row, num_queries, &layer->query_norm, row);
        if (layer->key_norm.weight != NULL) apply_norm(row + num_queries, num_keys, &layer->key_norm, row + num_queries);
        if (layer->rope < 0) continue;
        int64_t angles = args->step->positions[t] * half;
        for (int64_t at = 0; at < num_queries + num_keys; at += d->head_dim)
            rotate(row + at, d->cosines[layer->rope] + angles, d->sines[layer->rope] + angles, half);
    }
    const float *keys = args->r->qkv + begin * stride + num_queries;
    write_kv(&args->kv, end - begin, args->step->slots + begin, keys, keys + num_keys, stride);
}

// ---------------------------------------------------------------- the pass

static kv_layer kv_of(const decoder *d, const decoder_step *s, int64_t layer) {
    int64_t side = s->num_blocks * s->block_size * d->num_kv_heads * kv_row_bytes(s->kv_dtype, d->head_dim);
    char *pool = s->pool;
    return (kv_layer){pool + 2 * layer * side, pool + (2 * layer + 1) * side, s->kv_dtype, s->block_size, d->num_kv_heads, d->head_dim};
}

static const float *input_of(row_args args, const float *from, int64_t width, const row_norm *norm, const matrix *next) {
    args.from = from;
    args.width = width;
    args.norm = norm;
    args.next = next;
    if (norm != NULL && norm->weight != NULL) {
        for_rows(&args, norm_task);
        return args.r->normed;
    }
    if (next->kind != MATRIX_F32) for_rows(&args, prepare_task);
    return from;
}

// hidden += x W^T + bias, through the norm, if there is one.
static void add_product(row_args args, const matrix *w, const float *x, const row_norm *norm, const matrix *following) {
    const rows *r = args.r;
    if (norm->weight == NULL) {
        multiply(w, args.num_rows, x, &r->quantized, r->hidden, args.d->hidden, OUTPUT_ADD, following);
        return;
    }
    multiply(w, args.num_rows, x, &r->quantized, r->normed, args.d->hidden, OUTPUT_STORE, following);
    args.norm = norm;
    for_rows(&args, add_normed_task);
}

static void run_attention(row_args args, const matrix *following) {
    const decoder *d = args.d;
    const decoder_layer *layer = args.layer;
    const decoder_step *s = args.step;
    const rows *r = args.r;
    const float *x = input_of(args, r->hidden, d->hidden, &layer->attention_norm, &layer->qkv);
    multiply(&layer->qkv, s->num_tokens, x, &r->quantized, r->qkv, layer->qkv.n, OUTPUT_STORE, &layer->output);
    for_rows(&args, write_kv_task);
    attention_call call = {
        .segments = s->segments, .tiles = s->tiles, .num_tiles = s->num_tiles, .queries = r->qkv, .query_stride = layer->qkv.n,
        .num_heads = d->num_heads, .scale = layer->attention_scale,
        .num_parts = is_bf16(&layer->qkv) ? parts_of(&layer->qkv) : 0, .window = layer->window, .sinks = layer->sinks,
        .out = r->attended};
    attend(&call, &args.kv);
    x = input_of(args, r->attended, d->num_heads * d->head_dim, NULL, &layer->output);
    add_product(args, &layer->output, x, &layer->attention_out_norm, following);
}

static void run_layer(const decoder *d, const decoder_step *s, const rows *r, int64_t number) {
    const decoder_layer *layer = &d->layers[number];
    const matrix *following = number + 1 < d->num_layers ? &layer[1].qkv : &d->lm_head;
    row_args args = {.d = d, .layer = layer, .step = s, .r = r, .num_rows = s->num_tokens, .kv = kv_of(d, s, number)};
    if (layer->num_experts > 1) {
        run_attention(args, &layer->router);
        add_experts(args, input_of(args, r->hidden, d->hidden, &layer->mlp_norm, &layer->router), following);
        return;
    }
    const matrix *up = &layer->experts->up, *down = &layer->experts->down;
    run_attention(args, up);
    const float *x = input_of(args, r->hidden, d->hidden, &layer->mlp_norm, up);
    multiply(up, s->num_tokens, x, &r->quantized, r->activated, down->k, (int)layer->up_mode, down);
    x = input_of(args, r->activated, down->k, NULL, down);
    add_product(args, down, x, &layer->mlp_out_norm, following);
}

static void compute_logits(const decoder *d, const decoder_step *s, const rows *r) {
    // Moves the wanted rows to the front. Their numbers ascend, so none is overwritten too early.
    for (int64_t i = 0; i < s->num_logits; i++)
        memmove(r->hidden + i * d->hidden, r->hidden + s->logit_rows[i] * d->hidden, d->hidden * 4);
    row_args args = {.d = d, .step = s, .r = r, .num_rows = s->num_logits};
    const float *x = input_of(args, r->hidden, d->hidden, &d->final_norm, &d->lm_head);
    multiply(&d->lm_head, s->num_logits, x, &r->quantized, s->logits, d->lm_head.n, OUTPUT_STORE, NULL);
}

// Runs layers [layer_begin, layer_end), embeddings before the first, logits after the last. Nothing
// else may run between two calls of one step. Returns 0 if there is no memory for the rows, else 1.
int64_t EXPORTED(run_decoder)(const decoder *d, const decoder_step *s, int64_t layer_begin, int64_t layer_end) {
    rows r;
    if (!get_rows(d, s->num_tokens, &r)) return 0;
    int64_t begin_ns = now_ns();
    if (layer_begin == 0) {
        row_args args = {.d = d, .step = s, .r = &r, .num_rows = s->num_tokens};
        for_rows(&args, embed_task);
    }
    for (int64_t layer = layer_begin; layer < layer_end; layer++) run_layer(d, s, &r, layer);
    if (layer_end == d->num_layers && s->num_logits > 0) compute_logits(d, s, &r);
    spent_ns += now_ns() - begin_ns;
    return 1;
}
