/* Forward: rows of an expert through both its matrices, then each token's weighted sum. */
#ifndef MOESAIC_FORWARD_H
#define MOESAIC_FORWARD_H

#include "mixture.h"

/* `s` holds the pre-activation of `columns` hidden values per row, gates first and values `apart`
   from them. Keep it if asked, and leave the activation in the place of the gates. */
static void bend(const mixture *m, const block *b, float *s, i64 lds, i64 apart, i64 f, i64 columns) {
    int gated = m->width == 2 * m->hidden;
    for (i64 r = 0; r < b->to - b->from; r++) {
        float *row = s + r * lds;
        if (m->pre) {
            float *kept = m->pre + (b->from + r) * m->width + f;
            memcpy(kept, row, (size_t)columns * 4);
            if (gated) memcpy(kept + m->hidden, row + apart, (size_t)columns * 4);
        }
        float bent[WIDE];
        for (i64 c = 0; c < columns; c += WIDE) {
            i64 some = min(WIDE, columns - c);
            activate((enum activation)m->activation, row + c, row + apart + c, bent, some);
            memcpy(row + c, bent, (size_t)some * 4);
        }
    }
}

/* Weights are packed once per block: worth it when there are many rows. */
static void forward_many(const mixture *m, const block *b, float *x, float *a, float *s, float *room) {
    i64 n = b->to - b->from, gated = m->width == 2 * m->hidden, most = gated ? WIDE / 2 : WIDE;
    matrix up = up_of(m, b->expert), down = down_of(m, b->expert);
    for (i64 f = 0; f < m->hidden; f += most) {
        i64 columns = min(most, m->hidden - f);
        product(x, n, m->dim, &up, 0, f, columns, s, WIDE, room);
        if (gated) product(x, n, m->dim, &up, 0, m->hidden + f, columns, s + most, WIDE, room);
        bend(m, b, s, WIDE, most, f, columns);
        matrix bent = {s, FLOAT32, WIDE, NULL};
        pack_rows(a, n, m->hidden, &bent, f, columns, 0);
    }
    for (i64 c = 0; c < m->dim; c += WIDE) {
        i64 columns = min(WIDE, m->dim - c);
        product(a, n, m->hidden, &down, 0, c, columns, s, WIDE, room);
        for (i64 r = 0; r < n; r++)
            memcpy(m->rows + (b->from + r) * m->dim + c, s + r * WIDE, (size_t)columns * 4);
    }
}

/* Weights are read once, where they lie: what counts when there are few rows is reading them. */
static void forward_few(const mixture *m, const block *b, float *x, float *a, float *s, float *room) {
    i64 n = b->to - b->from, lds = whole(max(m->width, m->dim));
    matrix up = up_of(m, b->expert), down = down_of(m, b->expert), bent = {s, FLOAT32, lds, NULL};
    stream(x, n, m->dim, &up, m->width, s, lds, room);
    bend(m, b, s, lds, m->hidden, 0, m->hidden);
    pack_rows(a, n, m->hidden, &bent, 0, m->hidden, 0);
    stream(a, n, m->hidden, &down, m->dim, s, lds, room);
    for (i64 r = 0; r < n; r++)
        memcpy(m->rows + (b->from + r) * m->dim, s + r * lds, (size_t)m->dim * 4);
}

static void forward_block(void *data, i64 task) {
    job *job = data;
    const mixture *m = job->m;
    const block *b = job->blocks + task;
    i64 n = b->to - b->from, few = m->ends[b->expert] - begin_of(m, b->expert) <= FEW;
    i64 lds = few ? whole(max(m->width, m->dim)) : WIDE;
    size_t sizes[] = {(size_t)(padded(n) * m->dim), (size_t)(padded(n) * m->hidden),
                      (size_t)(padded(n) * lds), DEPTH * (WIDE + NR)};
    float *x = (float *)thread_memory(4 * (sizes[0] + sizes[1] + sizes[2] + sizes[3] + 64));
    if (!x) {
        atomic_store(&job->failed, 1);
        return;
    }
    float *a = x + sizes[0], *s = a + sizes[1], *room = s + sizes[2];
    matrix rows = {m->x, m->x_kind, m->dim, m->source + b->from};
    pack_rows(x, n, m->dim, &rows, 0, m->dim, 0);
    (few ? forward_few : forward_many)(m, b, x, a, s, room);
}

static void forward_home(void *data, i64 task) {
    job *job = data;
    home(job, task, job->m->weight, job->m->out);
}

#endif
