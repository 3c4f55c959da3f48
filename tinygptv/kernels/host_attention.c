/* What a step of the language model does between its matrix products, for tokens of many sequences: norms and rotation of
 * queries and keys, writing to the cache, attention of new tokens and of short prompts, and the sum of a layer's branches.
 *
 * Notation: T tokens, L cache length, N heads, H head width (a multiple of 16, at most 256), D width (a multiple of 16).
 */
#include "host_attention.h"

#include "host_threads.h"
#include "host_vectors.h"

#define MOST_WIDTH 256
#define MOST_PARTS (MOST_WIDTH / LANES)
#define STRETCH 64 /* positions whose scores are computed together */

/* A head after its norm; `weight` NULL leaves it as it is. */
INLINE void normalise(const float *x, const float *weight, const float *bias, float eps, int width, float *to) {
    if (weight)
        layer_norm(x, weight, bias, eps, width, to);
    else
        memcpy(to, x, width * sizeof(float));
}

/* x * cos + partner * sin, where the first `rotary` numbers of a head are pairs, half of `rotary` apart. `sin` has the
 * signs. */
INLINE void rotate(float *x, const float *cos, const float *sin, int rotary) {
    for (int i = 0, half = rotary / 2; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] + b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* The cache holds float32 or, `half`, bfloat16. */
INLINE floats load_cached(const void *row, int64_t at, int half) {
    return half ? load_bfloats((const uint16_t *)row + at) : load_floats((const float *)row + at);
}

/* Values are read while scores are computed from keys, and the next keys while values are summed: so memory does not wait. */
INLINE void read_soon(const void *row, int64_t at, int half) {
    __builtin_prefetch(half ? (const char *)((const uint16_t *)row + at) : (const char *)((const float *)row + at), 0, 2);
}

INLINE void store_cached(void *cache, int64_t row, const float *x, int width, int half) {
    if (half)
        for (int i = 0; i < width; i++) ((uint16_t *)cache)[row * width + i] = to_bfloat(x[i]);
    else
        memcpy((float *)cache + row * width, x, width * sizeof(float));
}

/* Softmax attention of one query over `length` rows of keys and values that start at `row`. Then comes one over rows that
 * start at `next`. */
INLINE void attend(
    const float *query, const void *keys, const void *values, int64_t row, int64_t length, int64_t next, int width,
    float scale, int half, float *out
) {
    const int parts = width / LANES;
    floats sum[MOST_PARTS];
    float most = -INFINITY, total = 0, weights[STRETCH];
    for (int i = 0; i < parts; i++) sum[i] = all(0);
    for (int64_t start = 0; start < length; start += STRETCH) {
        const int count = length - start < STRETCH ? length - start : STRETCH;
        float largest_here = most;
        for (int p = 0; p < STRETCH; p++) weights[p] = -INFINITY;
        for (int p = 0; p < count; p++) {
            floats dot = all(0);
            for (int i = 0; i < parts; i++) read_soon(values, (row + start + p) * width + i * LANES, half);
            for (int i = 0; i < parts; i++)
                dot = mul_add(load_floats(query + i * LANES), load_cached(keys, (row + start + p) * width + i * LANES, half), dot);
            weights[p] = sum_of(dot) * scale;
            largest_here = weights[p] > largest_here ? weights[p] : largest_here;
        }
        floats here = all(0);
        for (int p = 0; p < STRETCH; p += LANES) {
            floats e = exp_of(sub(load_floats(weights + p), all(largest_here)));
            store_floats(weights + p, e);
            here = add(here, e);
        }
        const float before = expf(most - largest_here);
        total = total * before + sum_of(here);
        most = largest_here;
        const int64_t soon = start + STRETCH < length ? row + start + STRETCH : next;
        for (int i = 0; i < parts; i++) {
            floats s = mul(sum[i], all(before));
            for (int p = 0; p < count; p++) {
                read_soon(keys, soon * width + (i * count + p) * LANES, half);
                s = mul_add(all(weights[p]), load_cached(values, (row + start + p) * width + i * LANES, half), s);
            }
            sum[i] = s;
        }
    }
    for (int i = 0; i < parts; i++) store_floats(out + i * LANES, divide(sum[i], all(total)));
}

/* Attend for one head of a token over the rows of the cache from its sequence's first position to its own. */
INLINE void attend_cached(const Attention *s, const float *query, int64_t item) {
    const int64_t position = s->positions[item / s->heads], first = s->cache_rows[item] - position;
    const int64_t after = item + 1 < s->decoding * s->heads ? item + 1 : item;
    const int64_t next = s->cache_rows[after] - s->positions[after / s->heads];
    float *out = s->out + item * s->width;
    if (s->half)
        attend(query, s->keys, s->values, first, position + 1, next, s->width, s->scale, 1, out);
    else
        attend(query, s->keys, s->values, first, position + 1, next, s->width, s->scale, 0, out);
}

void attend_head(void *argument, int64_t item) {
    const Attention *s = argument;
    const int width = s->width;
    const int64_t t = item / s->heads, n = item % s->heads, row = s->cache_rows[item], position = s->positions[t];
    const float *head = s->qkv + (3 * t * s->heads + n) * width, *value = head + 2 * s->heads * width;
    float query[MOST_WIDTH], key[MOST_WIDTH], *out = s->out + item * width;
    normalise(head, s->q_weight, s->q_bias, s->eps, width, query);
    normalise(head + s->heads * width, s->k_weight, s->k_bias, s->eps, width, key);
    rotate(query, s->cos + position * width, s->sin + position * width, s->rotary);
    rotate(key, s->cos + position * width, s->sin + position * width, s->rotary);
    store_cached(s->keys, row, key, width, s->half);
    store_cached(s->values, row, value, width, s->half);
    if (t >= s->decoding)
        memcpy(out, query, width * sizeof(float));
    else
        attend_cached(s, query, item);
}

void attend_prompt_head(void *argument, int64_t item) {
    const Attention *s = argument;
    float query[MOST_WIDTH];
    item += s->decoding * s->heads;
    memcpy(query, s->out + item * s->width, s->width * sizeof(float));
    attend_cached(s, query, item);
}

/* Norm, rotate and store keys and values of `tokens`, and attend for the first `attended` of them; of later tokens the
 * rotated query goes to `out`. */
void attend_tokens(Attention *attention, int64_t tokens, int64_t attended, int threads) {
    share_items(attend_head, attention, tokens * attention->heads, threads);
    share_items(attend_prompt_head, attention, (attended - attention->decoding) * attention->heads, threads);
}

void add_row(void *argument, int64_t t) {
    const Sum *s = argument;
    const int64_t start = t * s->width;
    float factor = 1;
    if (s->weight) {
        floats square = all(0);
        for (int64_t i = start; i < start + s->width; i += LANES) {
            floats a = load_floats(s->attention + i);
            square = mul_add(a, a, square);
        }
        factor = 1 / sqrtf(sum_of(square) / s->width + s->eps);
    }
    for (int64_t i = 0; i < s->width; i += LANES) {
        floats a = mul(load_floats(s->attention + start + i), all(factor));
        if (s->weight) a = mul(load_floats(s->weight + i), a);
        a = add(add(a, load_floats(s->mlp + start + i)), load_floats(s->hidden + start + i));
        store_floats(s->out + start + i, a);
    }
}

/* out [T, D] = RMSNorm(attention) + mlp + hidden; `weight` [D], or NULL for no norm. */
void add_branches(
    const float *attention, const float *weight, float eps, const float *mlp, const float *hidden, int64_t tokens,
    int64_t width, float *out, int threads
) {
    Sum s = {
        .attention = attention, .weight = weight, .mlp = mlp, .hidden = hidden, .out = out, .eps = eps, .width = width
    };
    share_items(add_row, &s, tokens, threads);
}

void norm_row(void *argument, int64_t row) {
    const Norm *n = argument;
    layer_norm(n->x + row * n->width, n->weight, n->bias, n->eps, n->width, n->out + row * n->width);
}

/* out [T, D] = LayerNorm of x. */
void norm_rows(
    const float *x, const float *weight, const float *bias, float eps, int64_t rows, int64_t width, float *out, int threads
) {
    Norm n = {.x = x, .weight = weight, .bias = bias, .eps = eps, .out = out, .width = width};
    share_items(norm_row, &n, rows, threads);
}

typedef struct {
    float *x;
    int64_t width;
} Rows;

static void gelu_row(void *argument, int64_t row) {
    const Rows *r = argument;
    float *x = r->x + row * r->width;
    for (int64_t i = 0; i < r->width; i += LANES) store_floats(x + i, tanh_gelu(load_floats(x + i)));
}

/* Tanh GELU of [T, D], in place. */
void gelu_rows(float *x, int64_t rows, int64_t width, int threads) {
    Rows r = {.x = x, .width = width};
    share_items(gelu_row, &r, rows, threads);
}
