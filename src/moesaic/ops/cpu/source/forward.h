/* Forward: each expert's feed-forward on its rows, then each token's weighted sum. */
#ifndef MOESAIC_FORWARD_H
#define MOESAIC_FORWARD_H

#include "moe.h"

/* `s` holds the pre-activation of `columns` hidden values per row: gates, and values `value_offset`
   after them. Save it if requested, and replace the gates by the activation. */
static void activation_rows_forward(const moe_args *m, const row_block *b, float *s, i64 stride, i64 value_offset, i64 f, i64 columns) {
    int gated = m->width == 2 * m->hidden;
    for (i64 r = 0; r < b->end - b->begin; r++) {
        float *row = s + r * stride;
        if (m->pre_activation) {
            float *saved = m->pre_activation + (b->begin + r) * m->width + f;
            memcpy(saved, row, (size_t)columns * 4);
            if (gated) memcpy(saved + m->hidden, row + value_offset, (size_t)columns * 4);
        }
        float activated[N_CHUNK];
        for (i64 c = 0; c < columns; c += N_CHUNK) {
            i64 some = min(N_CHUNK, columns - c);
            activation_forward((enum activation)m->activation, row + c, row + value_offset + c, activated, some);
            memcpy(row + c, activated, (size_t)some * 4);
        }
    }
}

/* Weights are packed once per block: faster for many rows. */
static void forward_packed(const moe_args *m, const row_block *b, float *x, float *a, float *s, float *pack_buffer) {
    i64 n = b->end - b->begin, gated = m->width == 2 * m->hidden, most = gated ? N_CHUNK / 2 : N_CHUNK;
    matrix_view up = up_matrix(m, b->expert), down = down_matrix(m, b->expert);
    for (i64 f = 0; f < m->hidden; f += most) {
        i64 columns = min(most, m->hidden - f);
        packed_gemm(x, n, m->dim, &up, 0, f, columns, s, N_CHUNK, pack_buffer);
        if (gated) packed_gemm(x, n, m->dim, &up, 0, m->hidden + f, columns, s + most, N_CHUNK, pack_buffer);
        activation_rows_forward(m, b, s, N_CHUNK, most, f, columns);
        matrix_view activated = {s, FLOAT32, N_CHUNK, NULL};
        pack_rows(a, n, m->hidden, &activated, f, columns, 0);
    }
    for (i64 c = 0; c < m->dim; c += N_CHUNK) {
        i64 columns = min(N_CHUNK, m->dim - c);
        packed_gemm(a, n, m->hidden, &down, 0, c, columns, s, N_CHUNK, pack_buffer);
        for (i64 r = 0; r < n; r++)
            memcpy(m->row_buffer + (b->begin + r) * m->dim + c, s + r * N_CHUNK, (size_t)columns * 4);
    }
}

/* Weights are read once, unpacked: for few rows, reading them is the cost. */
static void forward_streamed(const moe_args *m, const row_block *b, float *x, float *a, float *s, float *pack_buffer) {
    i64 n = b->end - b->begin, stride = round_up_to_nr(max(m->width, m->dim));
    matrix_view up = up_matrix(m, b->expert), down = down_matrix(m, b->expert), activated = {s, FLOAT32, stride, NULL};
    streamed_gemm(x, n, m->dim, &up, m->width, s, stride, pack_buffer);
    activation_rows_forward(m, b, s, stride, m->hidden, 0, m->hidden);
    pack_rows(a, n, m->hidden, &activated, 0, m->hidden, 0);
    streamed_gemm(a, n, m->hidden, &down, m->dim, s, stride, pack_buffer);
    for (i64 r = 0; r < n; r++)
        memcpy(m->row_buffer + (b->begin + r) * m->dim, s + r * stride, (size_t)m->dim * 4);
}

static void forward_block(void *data, i64 task) {
    task_context *context = data;
    const moe_args *m = context->m;
    const row_block *b = context->blocks + task;
    i64 n = b->end - b->begin, few = m->offsets[b->expert] - expert_begin(m, b->expert) <= STREAM_MAX_ROWS;
    i64 stride = few ? round_up_to_nr(max(m->width, m->dim)) : N_CHUNK;
    size_t sizes[] = {(size_t)(padded_rows(n) * m->dim), (size_t)(padded_rows(n) * m->hidden),
                      (size_t)(padded_rows(n) * stride), K_BLOCK * (N_CHUNK + NR)};
    float *x = (float *)thread_scratch(4 * (sizes[0] + sizes[1] + sizes[2] + sizes[3] + 64));
    if (!x) {
        atomic_store(&context->failed, 1);
        return;
    }
    float *a = x + sizes[0], *s = a + sizes[1], *pack_buffer = s + sizes[2];
    matrix_view rows = {m->x, m->x_dtype, m->dim, m->token_of_row + b->begin};
    pack_rows(x, n, m->dim, &rows, 0, m->dim, 0);
    (few ? forward_streamed : forward_packed)(m, b, x, a, s, pack_buffer);
}

static void forward_unpermute(void *data, i64 task) {
    task_context *context = data;
    unpermute_sum(context, task, context->m->weight, context->m->out);
}

#endif
