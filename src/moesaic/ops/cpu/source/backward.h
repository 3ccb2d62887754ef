/* Backward in three rounds: rows of an expert (gradients of its input, its pre-activation and the
   edges' weights), then the gradients of the matrices, then each token's sum.

   What the forward pass kept is x and the pre-activation; the rest is computed again. The gradient
   of an edge's weight is <activation, its gradient>, so no expert's answer was kept. */
#ifndef MOESAIC_BACKWARD_H
#define MOESAIC_BACKWARD_H

#include "mixture.h"

/* From the gradient `s` of the activation: everything that belongs to hidden values [f, f+columns).
   `dots` collects the gradients of the weights; `g` has room for two rows of WIDE per row. */
static void unbend(const mixture *m, const block *b, float *s, float *g, float *dots, i64 f,
                   i64 columns) {
    int gated = m->width == 2 * m->hidden;
    for (i64 r = 0; r < b->to - b->from; r++) {
        i64 p = b->from + r;
        const float *pre = m->pre + p * m->width + f;
        float active[WIDE], *dg = g + r * 2 * WIDE, *dv = dg + WIDE;
        dots[r] += activate_back((enum activation)m->activation, m->weight[m->order[p]], pre,
                                 pre + m->hidden, s + r * WIDE, active, dg, dv, columns);
        if (!m->active) continue;
        memcpy(m->active + p * m->hidden + f, active, (size_t)columns * 4);
        memcpy(m->grad_pre + p * m->width + f, dg, (size_t)columns * 4);
        if (gated) memcpy(m->grad_pre + p * m->width + m->hidden + f, dv, (size_t)columns * 4);
    }
}

static void backward_block(void *data, i64 task) {
    job *job = data;
    const mixture *m = job->m;
    const block *b = job->blocks + task;
    i64 n = b->to - b->from, gated = m->width == 2 * m->hidden, lots = padded(n);
    size_t sizes[] = {(size_t)(lots * m->dim), (size_t)(lots * m->width), (size_t)(lots * WIDE),
                      (size_t)(lots * 2 * WIDE), (size_t)lots, DEPTH * (WIDE + NR)};
    size_t total = 64;
    for (int i = 0; i < 6; i++) total += sizes[i];
    float *y = (float *)thread_memory(4 * total);
    if (!y) {
        atomic_store(&job->failed, 1);
        return;
    }
    float *h = y + sizes[0], *s = h + sizes[1], *g = s + sizes[2], *dots = g + sizes[3];
    float *room = dots + sizes[4];
    matrix up = up_of(m, b->expert), down = down_of(m, b->expert);
    matrix rows = {m->grad, m->x_kind, m->dim, m->source + b->from};
    matrix gates = {g, FLOAT32, 2 * WIDE, NULL}, values = {g + WIDE, FLOAT32, 2 * WIDE, NULL};
    pack_rows(y, n, m->dim, &rows, 0, m->dim, 0);
    memset(dots, 0, (size_t)n * 4);
    for (i64 f = 0; f < m->hidden; f += WIDE) {
        i64 columns = min(WIDE, m->hidden - f);
        product(y, n, m->dim, &down, 1, f, columns, s, WIDE, room);
        unbend(m, b, s, g, dots, f, columns);
        if (!m->grad_x) continue;
        pack_rows(h, n, m->width, &gates, f, columns, 0);
        if (gated) pack_rows(h, n, m->width, &values, m->hidden + f, columns, 0);
    }
    if (m->grad_weight)
        for (i64 r = 0; r < n; r++) m->grad_weight[m->order[b->from + r]] = dots[r];
    for (i64 c = 0; m->grad_x && c < m->dim; c += WIDE) {
        i64 columns = min(WIDE, m->dim - c);
        product(h, n, m->width, &up, 1, c, columns, s, WIDE, room);
        for (i64 r = 0; r < n; r++)
            memcpy(m->rows + (b->from + r) * m->dim + c, s + r * WIDE, (size_t)columns * 4);
    }
}

/* Rows [from, to) of the gradient of one matrix: a sum over all the expert's edges, in their order,
   so that its bits do not depend on the number of threads. */
static void matrix_gradient(void *data, i64 task) {
    job *job = data;
    const mixture *m = job->m;
    const block *b = job->blocks + task;
    i64 begin = begin_of(m, b->expert), depth = m->ends[b->expert] - begin, n = b->to - b->from;
    i64 height = b->down ? m->hidden : m->dim, columns = b->down ? m->dim : m->width;
    i64 size = size_of(m->w_kind), offset = (b->expert * height + b->from) * columns;
    char *out = (char *)(b->down ? m->grad_down : m->grad_up) + offset * size;
    if (!depth) {
        memset(out, 0, (size_t)(n * columns * size));
        return;
    }
    size_t sizes[] = {(size_t)(padded(n) * depth), (size_t)(padded(n) * WIDE), DEPTH * (WIDE + NR)};
    float *a = (float *)thread_memory(4 * (sizes[0] + sizes[1] + sizes[2] + 64));
    if (!a) {
        atomic_store(&job->failed, 1);
        return;
    }
    float *s = a + sizes[0], *room = s + sizes[1];
    const i64 *source = m->source + begin;
    matrix x = {m->x, m->x_kind, m->dim, source}, y = {m->grad, m->x_kind, m->dim, source};
    matrix active = {m->active + begin * m->hidden, FLOAT32, m->hidden, NULL};
    matrix pre = {m->grad_pre + begin * m->width, FLOAT32, m->width, NULL};
    pack_columns(a, n, depth, b->down ? &active : &x, b->from);
    for (i64 c = 0; c < columns; c += WIDE) {
        i64 some = min(WIDE, columns - c);
        product(a, n, depth, b->down ? &y : &pre, 0, c, some, s, WIDE, room);
        for (i64 r = 0; r < n; r++)
            put_row_once(out + (r * columns + c) * size, s + r * WIDE, some, (enum kind)m->w_kind);
    }
    settle();
}

/* Blocks of both gradients of every expert, empty ones included: those are zero. */
static block *gradient_blocks(const mixture *m, i64 *count) {
    i64 each = ceil_div(m->dim, LEAST_ROWS) + ceil_div(m->hidden, LEAST_ROWS) + 2;
    block *blocks = malloc(sizeof(block) * (size_t)(m->experts * each));
    i64 live = m->ends[m->experts - 1], total = live * m->dim * (m->width + m->hidden);
    *count = 0;
    for (i64 e = 0; blocks && e < m->experts; e++)
        for (int down = 0; down < 2; down++) {
            if (!(down ? m->grad_down : m->grad_up)) continue;
            i64 n = m->ends[e] - begin_of(m, e), height = down ? m->hidden : m->dim;
            i64 cost = (n + 1) * (down ? m->dim : m->width);
            i64 fair = total / (4 * m->threads * cost), cached = (1 << 20) / (n + 1);
            i64 most = max(LEAST_ROWS, min(min(fair, cached), MOST_ROWS));
            *count += cut(blocks + *count, (block){.expert = e, .down = down}, height, most, cost);
        }
    if (blocks) qsort(blocks, (size_t)*count, sizeof(block), dearer_first);
    return blocks;
}

static void backward_home(void *data, i64 task) {
    job *job = data;
    home(job, task, NULL, job->m->grad_x);
}

#endif
