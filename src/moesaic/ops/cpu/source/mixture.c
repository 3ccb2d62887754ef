/* The mixture of experts on a CPU: out[t] = sum over edges of weight * down(act(up(x[t]))).

   Plain C without headers of torch: it is compiled in seconds and called with addresses. Read
   forward.h, then backward.h. Both passes return 0, or 1 when memory ran out. */
#include "backward.h"
#include "forward.h"

#define WORTH_A_THREAD (1 << 21) /* multiply-adds: some 50 microseconds */
#define API __attribute__((visibility("default")))

static i64 live_of(const mixture *m) { return m->ends[m->experts - 1]; }

/* No more threads than have work for longer than it takes to wake them. */
static int useful_threads(const mixture *m) {
    i64 work = live_of(m) * m->dim * (m->width + m->hidden);
    return (int)min(m->threads, 1 + work / WORTH_A_THREAD);
}

API int moesaic_forward(const mixture *m) {
    int threads = useful_threads(m);
    i64 count = 0, size = size_of((enum kind)m->x_kind);
    block *blocks = row_blocks(m, &count);
    job job = {.m = m, .blocks = blocks, .failed = !blocks};
    if (blocks) {
        if (m->pre) large_pages(m->pre, (size_t)(live_of(m) * m->width * 4));
        large_pages(m->rows, (size_t)(live_of(m) * m->dim * 4));
        large_pages(m->out, (size_t)(m->tokens * m->dim * size));
        run(forward_block, &job, count, threads);
        run(forward_home, &job, ceil_div(m->tokens, TOKENS), threads);
    }
    free(blocks);
    return atomic_load(&job.failed);
}

API int moesaic_backward(const mixture *m) {
    int threads = useful_threads(m);
    i64 count = 0, tall = 0, size = size_of((enum kind)m->w_kind);
    i64 bank = m->experts * m->dim * size;
    block *blocks = row_blocks(m, &count), *gradients = gradient_blocks(m, &tall);
    job rows = {.m = m, .blocks = blocks, .failed = !blocks};
    job matrices = {.m = m, .blocks = gradients, .failed = !gradients};
    if (blocks && gradients) {
        if (m->active) large_pages(m->active, (size_t)(live_of(m) * m->hidden * 4));
        if (m->grad_pre) large_pages(m->grad_pre, (size_t)(live_of(m) * m->width * 4));
        if (m->grad_x) large_pages(m->rows, (size_t)(live_of(m) * m->dim * 4));
        if (m->grad_up) large_pages(m->grad_up, (size_t)(bank * m->width));
        if (m->grad_down) large_pages(m->grad_down, (size_t)(bank * m->hidden));
        run(backward_block, &rows, count, threads);
        run(matrix_gradient, &matrices, tall, threads);
        if (m->grad_x) run(backward_home, &rows, ceil_div(m->tokens, TOKENS), threads);
    }
    free(blocks);
    free(gradients);
    return atomic_load(&rows.failed) || atomic_load(&matrices.failed);
}
