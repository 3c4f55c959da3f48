/* What happens to a step's rows between its products, in items that threads share (host_attention.c).
 *
 * Notation: T tokens, L cache length, N heads, H head width, D width. */
#pragma once

#include <stdint.h>

/* Attention of T tokens, of which the first `decoding` are one new token each of as many sequences. */
typedef struct {
    const float *qkv;                                 /* [T, 3, N, H] */
    const float *q_weight, *q_bias, *k_weight, *k_bias; /* [H], or NULL */
    const float *cos, *sin;                           /* [L, H], of all positions */
    const int64_t *positions, *cache_rows; /* [T]; [T, N], the row of the cache, behind those of earlier positions */
    void *keys, *values;                   /* [.., H], float32 or, `half`, bfloat16 */
    float *out;                            /* [T, N, H] */
    float eps, scale;
    int64_t decoding, heads;
    int rotary, half, width;
} Attention;

/* Norm, rotate and store the keys and values of a head of a token (item: token * N + head). A decoding token attends; of
 * others the rotated query goes to `out`. */
void attend_head(void *attention, int64_t item);

/* Attend for those others (item: (token - decoding) * N + head), after the keys and values of their neighbours are stored. */
void attend_prompt_head(void *attention, int64_t item);

/* out = RMSNorm(attention) + mlp + hidden; `weight` [D], or NULL for no norm. */
typedef struct {
    const float *attention, *weight, *mlp, *hidden;
    float *out, eps;
    int64_t width;
} Sum;

void add_row(void *sum, int64_t row);

/* out = LayerNorm(x). */
typedef struct {
    const float *x, *weight, *bias;
    float *out, eps;
    int64_t width;
} Norm;

void norm_row(void *norm, int64_t row);
