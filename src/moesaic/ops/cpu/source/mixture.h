/* What the two passes share: the description of a mixture, its cut into tasks, and the way home.

   Letters as in moesaic.ops.mixture: T tokens, N edges, E experts, D dim, F hidden, G width of the
   pre-activation. Edges are sorted by expert; `place` is where an edge lies in that order. */
#ifndef MOESAIC_MIXTURE_H
#define MOESAIC_MIXTURE_H

#include "activation.h"
#include "pool.h"
#include "product.h"

/* Every member takes eight bytes: the same list is in moesaic/ops/cpu/native.py. */
typedef struct {
    i64 tokens, experts, dim, hidden, width, activation, x_kind, w_kind, per_token, threads;
    const void *x, *up, *down;  /* [T D], [E D G], [E F D] */
    const int32_t *ends;        /* [E]: where each expert's edges end */
    const i64 *source, *order;  /* [N]: token and edge at a place */
    const i64 *place;           /* [N]: place of an edge */
    const i64 *edge, *first;    /* edges by token and where a token's begin [T+1], or NULL */
    const float *weight;        /* [N], by edge */
    float *pre;                 /* [live G]: the pre-activation, or NULL if nobody needs it */
    float *rows;                /* [live D]: room for a row per edge */
    void *out;                  /* [T D] */
    const void *grad;           /* [T D]: from here on for the way back alone */
    float *active, *grad_pre;   /* [live F], [live G]: room, or NULL without weight gradients */
    void *grad_x, *grad_up, *grad_down; /* each may be NULL */
    float *grad_weight;         /* [N], by edge, or NULL; zero where an edge was dropped */
} mixture;

/* Rows [from, to) of an expert, or of one of its gradients. */
typedef struct {
    i64 expert, from, to, cost;
    int down;
} block;

typedef struct {
    const mixture *m;
    const block *blocks;
    atomic_int failed; /* out of memory */
} job;

#define FEW 16         /* rows of an expert up to which weights are read where they lie */
#define MOST_ROWS 384  /* rows of a block: more would leave the cache */
#define LEAST_ROWS 48
#define TOKENS 64      /* tokens of a task on the way home */

INLINE i64 whole(i64 columns) { return ceil_div(columns, NR) * NR; }

INLINE i64 begin_of(const mixture *m, i64 e) { return e ? m->ends[e - 1] : 0; }

INLINE matrix up_of(const mixture *m, i64 e) {
    const char *base = (const char *)m->up + e * m->dim * m->width * size_of(m->w_kind);
    return (matrix){base, m->w_kind, m->width, NULL};
}

INLINE matrix down_of(const mixture *m, i64 e) {
    const char *base = (const char *)m->down + e * m->hidden * m->dim * size_of(m->w_kind);
    return (matrix){base, m->w_kind, m->dim, NULL};
}

static int dearer_first(const void *a, const void *b) {
    const block *p = a, *q = b;
    if (p->cost != q->cost) return p->cost < q->cost ? 1 : -1;
    if (p->expert != q->expert) return p->expert < q->expert ? -1 : 1;
    if (p->down != q->down) return p->down - q->down;
    return p->from < q->from ? -1 : 1;
}

/* Cut [0, n) into about equal blocks of at most `most`. */
static i64 cut(block *blocks, block like, i64 n, i64 most, i64 cost) {
    i64 count = ceil_div(n, most), step = count ? padded(ceil_div(n, count)) : 1, made = 0;
    for (i64 from = 0; from < n; from += step, made++) {
        blocks[made] = like;
        blocks[made].from = from, blocks[made].to = min(n, from + step);
        blocks[made].cost = (blocks[made].to - from) * cost;
    }
    return made;
}

/* Blocks of sorted rows. How they are cut changes who computes a row and when, never a bit of it. */
static block *row_blocks(const mixture *m, i64 *count) {
    i64 live = m->ends[m->experts - 1];
    i64 most = max(LEAST_ROWS, min(MOST_ROWS, live / (3 * m->threads)));
    block *blocks = malloc(sizeof(block) * (size_t)(live / LEAST_ROWS * 2 + 2 * m->experts + 2));
    *count = 0;
    for (i64 e = 0; blocks && e < m->experts; e++) {
        i64 begin = begin_of(m, e), n = m->ends[e] - begin;
        i64 made = cut(blocks + *count, (block){.expert = e}, n, most, 1);
        for (i64 i = *count; i < *count + made; i++) blocks[i].from += begin, blocks[i].to += begin;
        *count += made;
    }
    if (blocks) qsort(blocks, (size_t)*count, sizeof(block), dearer_first);
    return blocks;
}

/* Each token's sum over its edges, in the order of edges: the same bits every time. */
static void home(job *job, i64 task, const float *weight, void *out) {
    const mixture *m = job->m;
    i64 live = m->ends[m->experts - 1], size = size_of(m->x_kind);
    float *sum = m->x_kind == FLOAT32 ? NULL : (float *)thread_memory((size_t)m->dim * 4);
    if (m->x_kind != FLOAT32 && !sum) {
        atomic_store(&job->failed, 1);
        return;
    }
    for (i64 t = task * TOKENS; t < min(m->tokens, (task + 1) * TOKENS); t++) {
        char *to = (char *)out + t * m->dim * size;
        float *restrict s = m->x_kind == FLOAT32 ? (float *)to : sum;
        i64 begin = m->first ? m->first[t] : t * m->per_token, some = 0;
        i64 end = m->first ? m->first[t + 1] : begin + m->per_token;
        for (i64 i = begin; i < end; i++) {
            i64 n = m->edge ? m->edge[i] : i, p = m->place[n];
            if (p >= live) continue;
            const float *restrict row = m->rows + p * m->dim;
            float w = weight ? weight[n] : 1.0f;
            if (some++)
                for (i64 c = 0; c < m->dim; c++) s[c] += w * row[c];
            else
                for (i64 c = 0; c < m->dim; c++) s[c] = w * row[c];
        }
        if (!some) memset(s, 0, (size_t)m->dim * 4);
        if (m->x_kind == BFLOAT16) put_row(to, s, m->dim, BFLOAT16);
    }
}

#endif
