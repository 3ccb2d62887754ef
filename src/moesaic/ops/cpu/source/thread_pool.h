/* Thread pool.

   `parallel_for` runs tasks 0..n-1 on at most `threads` threads, including the caller. A worker that
   wakes after all tasks are taken does not delay the caller. The pool serves one caller at a time; a
   concurrent caller runs its tasks on its own thread. A forked child starts with an empty pool, since
   threads do not survive a fork. */
#ifndef MOESAIC_THREAD_POOL_H
#define MOESAIC_THREAD_POOL_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "simd.h"

#define MAX_THREADS 256
#define HUGE_PAGE ((size_t)1 << 21)

typedef void (*task_function)(void *context, i64 task);

static struct {
    pthread_mutex_t lock, caller_lock;
    pthread_cond_t work_ready, work_done;
    task_function function;
    void *context;
    i64 tasks;
    atomic_llong next;
    int workers, requested, active, accepting;
    unsigned generation;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER,
          .caller_lock = PTHREAD_MUTEX_INITIALIZER,
          .work_ready = PTHREAD_COND_INITIALIZER,
          .work_done = PTHREAD_COND_INITIALIZER};

/* Scratch memory of a thread: it grows, and is reused by later calls to avoid page faults. */
static _Thread_local struct {
    char *bytes;
    size_t size;
} scratch;
static pthread_key_t scratch_key;
static pthread_once_t init_once = PTHREAD_ONCE_INIT;

/* Request huge pages: fewer page faults for memory that is written once from end to end. */
static void advise_huge_pages(void *start, size_t size) {
#if defined(MADV_HUGEPAGE)
    uintptr_t from = ((uintptr_t)start + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    uintptr_t to = ((uintptr_t)start + size) & ~(HUGE_PAGE - 1);
    if (size >= 2 * HUGE_PAGE && to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)start, (void)size;
#endif
}

static char *thread_scratch(size_t size) {
    if (scratch.size >= size) return scratch.bytes;
    free(scratch.bytes);
    scratch.bytes = NULL, scratch.size = 0;
    void *found = NULL;
    if (posix_memalign(&found, size >= HUGE_PAGE ? HUGE_PAGE : 64, size)) return NULL;
    advise_huge_pages(found, size);
    scratch.bytes = found, scratch.size = size;
    pthread_setspecific(scratch_key, found);
    return found;
}

static void run_tasks(task_function function, void *context, i64 tasks) {
    for (;;) {
        i64 task = atomic_fetch_add(&pool.next, 1);
        if (task >= tasks) return;
        function(context, task);
    }
}

static void *worker_loop(void *id) {
    unsigned seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.generation == seen || !pool.accepting || (intptr_t)id >= pool.requested) {
            seen = pool.generation;
            pthread_cond_wait(&pool.work_ready, &pool.lock);
        }
        seen = pool.generation;
        pool.active++;
        task_function function = pool.function;
        void *context = pool.context;
        i64 tasks = pool.tasks;
        pthread_mutex_unlock(&pool.lock);
        run_tasks(function, context, tasks);
        pthread_mutex_lock(&pool.lock);
        if (--pool.active == 0) pthread_cond_signal(&pool.work_done);
    }
    return NULL;
}

static void spawn_workers(int requested) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* workers handle no signals */
    while (pool.workers < requested) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker_loop, (void *)(intptr_t)pool.workers)) break;
        pthread_detach(thread);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void reset_pool_after_fork(void) {
    pthread_mutex_init(&pool.lock, NULL);
    pthread_mutex_init(&pool.caller_lock, NULL);
    pthread_cond_init(&pool.work_ready, NULL);
    pthread_cond_init(&pool.work_done, NULL);
    pool.workers = pool.active = pool.accepting = 0;
}

static void init_pool(void) {
    pthread_key_create(&scratch_key, free);
    pthread_atfork(NULL, NULL, reset_pool_after_fork);
}

static void parallel_for(task_function function, void *context, i64 tasks, int threads) {
    pthread_once(&init_once, init_pool);
    threads = (int)min(min(threads, MAX_THREADS), tasks);
    if (threads <= 1 || pthread_mutex_trylock(&pool.caller_lock)) {
        for (i64 task = 0; task < tasks; task++) function(context, task);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    spawn_workers(threads - 1);
    pool.function = function, pool.context = context, pool.tasks = tasks;
    pool.requested = threads - 1, pool.accepting = 1, pool.generation++;
    atomic_store(&pool.next, 0);
    pthread_cond_broadcast(&pool.work_ready);
    pthread_mutex_unlock(&pool.lock);
    run_tasks(function, context, tasks);
    pthread_mutex_lock(&pool.lock);
    pool.accepting = 0;
    while (pool.active) pthread_cond_wait(&pool.work_done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.caller_lock);
}

#endif
