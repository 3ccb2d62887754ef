/* Arguments of both passes, the blocks of work, and the weighted sum back to tokens.

   Letters as in moesaic.ops.moe_kernel: T tokens, N edges, E experts, D dim, F hidden, G width of the
   pre-activation. Rows are edges sorted by expert. */
#ifndef MOESAIC_MOE_H
#define MOESAIC_MOE_H

#include "activation.h"
#include "gemm.h"
#include "thread_pool.h"

/* Every member takes eight bytes; moesaic/ops/cpu/cpu_moe_kernel.py has the same list. */
typedef struct {
    i64 tokens, experts, dim, hidden, width, activation, x_dtype, weight_dtype, per_token, threads;
    const void *x, *up, *down;               /* [T D], [E D G], [E F D] */
    const int32_t *offsets;                  /* [E]: end of each expert's rows */
    const i64 *token_of_row, *edge_of_row;   /* [N] */
    const i64 *row_of_edge;                  /* [N] */
    const i64 *edges_by_token, *token_offsets; /* [N] and [T+1], or NULL if edges are token-major */
    const float *weight;                     /* [N], by edge */
    float *pre_activation;                   /* [live G], or NULL without a backward pass */
    float *row_buffer;                       /* [live D]: expert output or input gradient by row */
    void *out;                               /* [T D] */
    const void *grad_out;                    /* [T D]: from here on for the backward pass only */
    float *weighted_activation, *grad_pre_activation; /* [live F], [live G]: buffers, or NULL */
    void *grad_x, *grad_up, *grad_down;      /* each may be NULL */
    float *grad_weight;                      /* [N], by edge, or NULL; zero for a dropped edge */
} moe_args;

/* Rows [begin, end) of an expert, or of one of its weight gradients. */
typedef struct {
    i64 expert, begin, end, cost;
    int is_down;
} row_block;

typedef struct {
    const moe_args *m;
    const row_block *blocks;
    atomic_int failed; /* out of memory */
} task_context;

#define STREAM_MAX_ROWS 16 /* rows of an expert up to which weights are not packed */
#define MAX_BLOCK_ROWS 384 /* more would not fit in the cache */
#define MIN_BLOCK_ROWS 48
#define TOKENS_PER_TASK 64 /* of unpermute_sum */

INLINE i64 round_up_to_nr(i64 columns) { return ceil_div(columns, NR) * NR; }

INLINE i64 expert_begin(const moe_args *m, i64 e) { return e ? m->offsets[e - 1] : 0; }

INLINE matrix_view up_matrix(const moe_args *m, i64 e) {
    const char *base = (const char *)m->up + e * m->dim * m->width * dtype_size(m->weight_dtype);
    return (matrix_view){base, m->weight_dtype, m->width, NULL};
}

INLINE matrix_view down_matrix(const moe_args *m, i64 e) {
    const char *base = (const char *)m->down + e * m->hidden * m->dim * dtype_size(m->weight_dtype);
    return (matrix_view){base, m->weight_dtype, m->dim, NULL};
}

static int compare_cost_descending(const void *a, const void *b) {
    const row_block *p = a, *q = b;
    if (p->cost != q->cost) return p->cost < q->cost ? 1 : -1;
    if (p->expert != q->expert) return p->expert < q->expert ? -1 : 1;
    if (p->is_down != q->is_down) return p->is_down - q->is_down;
    return p->begin < q->begin ? -1 : 1;
}

/* Split [0, n) into blocks of about equal size, at most `most`. */
static i64 split_into_blocks(row_block *blocks, row_block prototype, i64 n, i64 most, i64 cost) {
    i64 count = ceil_div(n, most), step = count ? padded_rows(ceil_div(n, count)) : 1, made = 0;
    for (i64 from = 0; from < n; from += step, made++) {
        blocks[made] = prototype;
        blocks[made].begin = from, blocks[made].end = min(n, from + step);
        blocks[made].cost = (blocks[made].end - from) * cost;
    }
    return made;
}

/* Blocks of sorted rows. The split decides which thread computes a row; it does not change results. */
static row_block *row_blocks(const moe_args *m, i64 *count) {
    i64 live = m->offsets[m->experts - 1];
    i64 most = max(MIN_BLOCK_ROWS, min(MAX_BLOCK_ROWS, live / (3 * m->threads)));
    row_block *blocks = malloc(sizeof(row_block) * (size_t)(live / MIN_BLOCK_ROWS * 2 + 2 * m->experts + 2));
    *count = 0;
    for (i64 e = 0; blocks && e < m->experts; e++) {
        i64 begin = expert_begin(m, e), n = m->offsets[e] - begin;
        i64 made = split_into_blocks(blocks + *count, (row_block){.expert = e}, n, most, 1);
        for (i64 i = *count; i < *count + made; i++) blocks[i].begin += begin, blocks[i].end += begin;
        *count += made;
    }
    if (blocks) qsort(blocks, (size_t)*count, sizeof(row_block), compare_cost_descending);
    return blocks;
}

/* Weighted sum over each token's edges, in the order of edges: deterministic. */
static void unpermute_sum(task_context *context, i64 task, const float *weight, void *out) {
    const moe_args *m = context->m;
    i64 live = m->offsets[m->experts - 1], size = dtype_size(m->x_dtype);
    float *sum = m->x_dtype == FLOAT32 ? NULL : (float *)thread_scratch((size_t)m->dim * 4);
    if (m->x_dtype != FLOAT32 && !sum) {
        atomic_store(&context->failed, 1);
        return;
    }
    for (i64 t = task * TOKENS_PER_TASK; t < min(m->tokens, (task + 1) * TOKENS_PER_TASK); t++) {
        char *to = (char *)out + t * m->dim * size;
        float *restrict s = m->x_dtype == FLOAT32 ? (float *)to : sum;
        i64 begin = m->token_offsets ? m->token_offsets[t] : t * m->per_token, some = 0;
        i64 end = m->token_offsets ? m->token_offsets[t + 1] : begin + m->per_token;
        for (i64 i = begin; i < end; i++) {
            i64 n = m->edges_by_token ? m->edges_by_token[i] : i, p = m->row_of_edge[n];
            if (p >= live) continue;
            const float *restrict row = m->row_buffer + p * m->dim;
            float w = weight ? weight[n] : 1.0f;
            if (some++)
                for (i64 c = 0; c < m->dim; c++) s[c] += w * row[c];
            else
                for (i64 c = 0; c < m->dim; c++) s[c] = w * row[c];
        }
        if (!some) memset(s, 0, (size_t)m->dim * 4);
        if (m->x_dtype == BFLOAT16) store_row(to, s, m->dim, BFLOAT16);
    }
}

#endif
