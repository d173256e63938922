// A layer whose MLP is a mixture of experts: a router chooses some for each row, and their results
// are added by its shares.
//
// Rows are gathered by expert, so that each product has all rows of its expert. A row's experts are
// added in the order of their numbers, whatever other rows there are.
#include "decoder.h"

#include <math.h>

static int64_t columns_of_routing(const decoder_layer *layer) { return (layer->num_experts + PANEL - 1) / PANEL * PANEL; }

static void place_experts(const decoder *d, int64_t num_tokens, char **at, rows *r) {
    int64_t columns = 0, pairs_per_token = 0;
    for (const decoder_layer *layer = d->layers; layer < d->layers + d->num_layers; layer++) {
        if (layer->num_experts == 1) continue;
        if (columns_of_routing(layer) > columns) columns = columns_of_routing(layer);
        if (layer->experts_per_token > pairs_per_token) pairs_per_token = layer->experts_per_token;
    }
    if (columns == 0) return;
    r->routing = (float *)reserve(at, num_tokens * columns * 4);
    r->chosen = (int32_t *)reserve(at, num_tokens * pairs_per_token * 4);
    r->shares = (float *)reserve(at, num_tokens * pairs_per_token * 4);
    r->pairs = (int32_t *)reserve(at, num_tokens * pairs_per_token * 4);
    r->pair_begin = (int64_t *)reserve(at, (columns + 1) * 8);
    r->gathered = (float *)reserve(at, num_tokens * d->hidden * 4);
    r->expert_out = (float *)reserve(at, num_tokens * d->hidden * 4);
}

// The experts with the highest of `routing`, in that order; of equal ones the first.
static void choose_experts(const decoder_layer *layer, const float *routing, int32_t *chosen) {
    int64_t num_chosen = 0;
    for (int32_t expert = 0; expert < layer->num_experts; expert++) {
        if (num_chosen == layer->experts_per_token && !(routing[expert] > routing[chosen[num_chosen - 1]])) continue;
        int64_t place = num_chosen < layer->experts_per_token ? num_chosen++ : num_chosen - 1;
        for (; place > 0 && routing[expert] > routing[chosen[place - 1]]; place--) chosen[place] = chosen[place - 1];
        chosen[place] = expert;
    }
}

// The softmax of the chosen experts, among themselves or among all. Overwrites `routing`.
static void share_among(const decoder_layer *layer, float *routing, const int32_t *chosen, float *shares) {
    const int64_t num_experts = layer->num_experts, columns = columns_of_routing(layer);
    const float highest = routing[chosen[0]];
    for (int64_t i = num_experts; i < columns; i++) routing[i] = -INFINITY;
    for (int64_t i = 0; i < columns; i += WIDE) store_wide(routing + i, exp_wide(load_wide(routing + i) - splat_wide(highest)));
    float total = 0;
    if (layer->shares_of_chosen)
        for (int64_t i = 0; i < layer->experts_per_token; i++) total += routing[chosen[i]];
    else
        for (int64_t i = 0; i < num_experts; i++) total += routing[i];
    for (int64_t i = 0; i < layer->experts_per_token; i++) shares[i] = routing[chosen[i]] / total;
}

static void route_task(void *argument, int64_t task) {
    const row_args *args = argument;
    const decoder_layer *layer = args->layer;
    int64_t begin, end, columns = columns_of_routing(layer);
    rows_of(args, task, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        int32_t *chosen = args->r->chosen + t * layer->experts_per_token;
        choose_experts(layer, args->r->routing + t * columns, chosen);
        share_among(layer, args->r->routing + t * columns, chosen, args->r->shares + t * layer->experts_per_token);
    }
}

// Sorts the pairs by expert, by counting.
static void group_pairs(const decoder_layer *layer, const rows *r, int64_t num_tokens) {
    const int64_t num_pairs = num_tokens * layer->experts_per_token;
    int64_t *end = r->pair_begin + 1;  // of each expert's pairs so far
    memset(r->pair_begin, 0, (layer->num_experts + 1) * sizeof(int64_t));
    for (int64_t pair = 0; pair < num_pairs; pair++) end[r->chosen[pair]]++;
    for (int64_t expert = 0, begin = 0; expert < layer->num_experts; expert++) {
        int64_t count = end[expert];
        end[expert] = begin;
        begin += count;
    }
    for (int64_t pair = 0; pair < num_pairs; pair++) r->pairs[end[r->chosen[pair]]++] = (int32_t)pair;
}

static int64_t row_of(const row_args *args, int64_t number) { return args->pairs[number] / args->layer->experts_per_token; }

static void gather_task(void *argument, int64_t task) {
    const row_args *args = argument;
    int64_t begin, end, width = args->d->hidden;
    rows_of(args, task, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        memcpy(args->r->gathered + i * width, args->from + row_of(args, i) * width, width * sizeof(float));
    prepare_rows(args->next, begin, end, args->r->gathered, &args->r->quantized);
}

// hidden += share * expert_out. No two pairs of an expert have the same row.
static void scatter_task(void *argument, int64_t task) {
    const row_args *args = argument;
    int64_t begin, end, width = args->d->hidden;
    rows_of(args, task, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const f32x8 share = splat8(args->r->shares[args->pairs[i]]);
        const float *from = args->r->expert_out + i * width;
        float *hidden = args->r->hidden + row_of(args, i) * width;
        for (int64_t at = 0; at < width; at += 8) store8(hidden + at, fma8(share, load8(from + at), load8(hidden + at)));
    }
}

static int64_t next_expert(const row_args *args, int64_t expert) {
    const int64_t *begin = args->r->pair_begin;
    while (expert < args->layer->num_experts && begin[expert] == begin[expert + 1]) expert++;
    return expert;
}

static void add_experts(row_args args, const float *x, const matrix *following) {
    const decoder_layer *layer = args.layer;
    const rows *r = args.r;
    const int64_t num_tokens = args.num_rows, num_experts = layer->num_experts, hidden = args.d->hidden;
    const int mode = (int)layer->up_mode;
    multiply(&layer->router, num_tokens, x, &r->quantized, r->routing, columns_of_routing(layer), OUTPUT_STORE, NULL);
    for_rows(&args, route_task);
    group_pairs(layer, r, num_tokens);
    for (int64_t expert = next_expert(&args, 0), next; expert < num_experts; expert = next) {
        const matrix *up = &layer->experts[expert].up, *down = &layer->experts[expert].down;
        next = next_expert(&args, expert + 1);
        args.pairs = r->pairs + r->pair_begin[expert];
        args.num_rows = r->pair_begin[expert + 1] - r->pair_begin[expert];
        args.from = x;
        args.next = up;
        for_rows(&args, gather_task);
        multiply(up, args.num_rows, r->gathered, &r->quantized, r->activated, down->k, mode, down);
        const float *activated = input_of(args, r->activated, down->k, NULL, down);
        const matrix *after = next < num_experts ? &layer->experts[next].up : following;
        multiply(down, args.num_rows, activated, &r->quantized, r->expert_out, hidden, OUTPUT_STORE, after);
        for_rows(&args, scatter_task);
    }
}
