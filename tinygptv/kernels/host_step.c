/* All layers of the language model for the tokens of a step, in one call.
 *
 * Notation: T tokens, D width, I width of the MLP.
 */
#include <stdlib.h>

#include "host_attention.h"
#include "host_linear.h"
#include "host_threads.h"

#define LINE 64

/* Parameters of a layer. In `attention`, `norm` and `sum`, what belongs to a step is open. */
typedef struct {
    Matrix qkv, dense, fc1, fc2; /* qkv and fc1 round their common input in the same way */
    Attention attention;
    Norm norm; /* no weight: none is applied */
    Sum sum;
} Layer;

/* What the parts of a layer hand to each other, a row for each token. */
typedef struct {
    float *hidden, *normed, *qkv, *attended, *dense, *middle, *mlp;
    Rounded to_first, to_dense, to_fc2;
    const int64_t *positions, *cache_rows;
    int64_t tokens, decoding;
} Rows;

/* A layer at work on them. */
typedef struct {
    Product qkv, dense, fc1, fc2;
    Attention attention;
    Norm norm;
    Sum sum;
} Work;

/* Cuts pieces that start at whole lines from a block of memory; without one it counts. */
typedef struct {
    char *memory;
    size_t used;
} Cut;

static void *cut(Cut *from, size_t bytes) {
    void *piece = from->memory ? from->memory + from->used : NULL;
    from->used += (bytes + LINE - 1) / LINE * LINE;
    return piece;
}

static Rounded cut_rounded(Cut *from, const Matrix *matrix, int64_t rows) {
    const size_t scales = count_scales(matrix, rows) * sizeof(float);
    return (Rounded){cut(from, rows * matrix->inputs), cut(from, scales), cut(from, scales)};
}

static void cut_rows(Cut *from, const Layer *layer, Rows *rows) {
    const int64_t tokens = rows->tokens;
    const size_t wide = tokens * layer->qkv.inputs * sizeof(float);
    rows->normed = cut(from, wide);
    rows->qkv = cut(from, 3 * wide);
    rows->attended = cut(from, wide);
    rows->dense = cut(from, wide);
    rows->middle = cut(from, tokens * layer->fc1.outputs * sizeof(float));
    rows->mlp = cut(from, wide);
    rows->to_first = cut_rounded(from, &layer->qkv, tokens);
    rows->to_dense = cut_rounded(from, &layer->dense, tokens);
    rows->to_fc2 = cut_rounded(from, &layer->fc2, tokens);
}

static Product product(const Matrix *matrix, const float *x, Rounded rounded, float *out, int64_t rows) {
    return (Product){.matrix = matrix, .x = x, .rounded = rounded, .out = out, .rows = rows};
}

static Work start(const Layer *layer, const Rows *r) {
    const float *input = layer->norm.weight ? r->normed : r->hidden;
    Work work = {
        .qkv = product(&layer->qkv, input, r->to_first, r->qkv, r->tokens),
        .fc1 = product(&layer->fc1, input, r->to_first, r->middle, r->tokens),
        .dense = product(&layer->dense, r->attended, r->to_dense, r->dense, r->tokens),
        .fc2 = product(&layer->fc2, r->middle, r->to_fc2, r->mlp, r->tokens),
        .attention = layer->attention,
        .norm = layer->norm,
        .sum = layer->sum
    };
    work.fc1.gelu = 1;
    work.attention.qkv = r->qkv;
    work.attention.out = r->attended;
    work.attention.positions = r->positions;
    work.attention.cache_rows = r->cache_rows;
    work.attention.decoding = r->decoding;
    work.norm.x = work.sum.hidden = r->hidden;
    work.norm.out = r->normed;
    work.sum.attention = r->dense;
    work.sum.mlp = r->mlp;
    work.sum.out = r->hidden;
    return work;
}

static void enter_row(void *argument, int64_t t) {
    Work *w = argument;
    if (w->norm.weight) norm_row(&w->norm, t);
    round_row(&w->qkv, t);
}

static void multiply_first(void *argument, int64_t item) {
    Work *w = argument;
    const int64_t items = count_items(&w->fc1);
    if (item < items)
        multiply_item(&w->fc1, item);
    else
        multiply_item(&w->qkv, item - items);
}

/* The MLP's rows are rounded while heads attend. */
static void attend_or_round(void *argument, int64_t item) {
    Work *w = argument;
    if (item < w->fc2.rows)
        round_row(&w->fc2, item);
    else
        attend_head(&w->attention, item - w->fc2.rows);
}

static void run_layer(Work *w, int threads) {
    const int64_t tokens = w->qkv.rows, heads = w->attention.heads;
    share_items(enter_row, w, tokens, threads);
    share_items(multiply_first, w, count_items(&w->fc1) + count_items(&w->qkv), threads);
    share_items(attend_or_round, w, tokens + tokens * heads, threads);
    share_items(attend_prompt_head, &w->attention, (tokens - w->attention.decoding) * heads, threads);
    share_items(multiply_item, &w->fc2, count_items(&w->fc2), threads);
    share_items(round_row, &w->dense, tokens, threads);
    share_items(multiply_item, &w->dense, count_items(&w->dense), threads);
    share_items(add_row, &w->sum, tokens, threads);
}

/* Map the residual stream `hidden` [T, D], in place, through `count` layers of equal size; caches are extended. The first
 * `decoding` tokens are one new token each of as many sequences. Returns 0, or 1 where memory is missing. */
int run_layers(
    const Layer *layers, int64_t count, float *hidden, const int64_t *positions, const int64_t *cache_rows,
    int64_t tokens, int64_t decoding, int threads
) {
    Rows rows = {.hidden = hidden, .positions = positions, .cache_rows = cache_rows, .tokens = tokens, .decoding = decoding};
    Cut size = {0};
    cut_rows(&size, layers, &rows);
    Cut from = {.memory = aligned_alloc(LINE, size.used)};
    if (!from.memory) return 1;
    cut_rows(&from, layers, &rows);
    for (int64_t i = 0; i < count; i++) {
        Work work = start(&layers[i], &rows);
        run_layer(&work, threads);
    }
    free(from.memory);
    return 0;
}
