/* A pool of threads that sleep when there is nothing to do.

   `run` hands out tasks 0..n-1 to at most `threads` threads, the caller among them. A helper that
   wakes too late finds the round closed and sleeps on: the caller never waits for one that has not
   begun. One caller at a time has the pool; a second one does its tasks alone. A forked child
   starts with an empty pool, since threads do not survive a fork. */
#ifndef MOESAIC_POOL_H
#define MOESAIC_POOL_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "simd.h"

#define MOST_THREADS 256
#define HUGE_PAGE ((size_t)1 << 21)

typedef void (*work)(void *job, i64 task);

static struct {
    pthread_mutex_t lock, turn;
    pthread_cond_t wake, done;
    work work;
    void *job;
    i64 tasks;
    atomic_llong next;
    int workers, wanted, active, open;
    unsigned round;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER,
          .turn = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

/* Memory of one thread: grows, and is kept from call to call so that its pages are not asked for
   again and again. */
static _Thread_local struct {
    char *bytes;
    size_t size;
} scratch;
static pthread_key_t scratch_key;
static pthread_once_t prepared = PTHREAD_ONCE_INIT;

/* Ask for large pages: what is written once from end to end is then written without a fault for
   every 4 KiB. */
static void large_pages(void *start, size_t size) {
#if defined(MADV_HUGEPAGE)
    uintptr_t from = ((uintptr_t)start + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    uintptr_t to = ((uintptr_t)start + size) & ~(HUGE_PAGE - 1);
    if (size >= 2 * HUGE_PAGE && to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)start, (void)size;
#endif
}

static char *thread_memory(size_t size) {
    if (scratch.size >= size) return scratch.bytes;
    free(scratch.bytes);
    scratch.bytes = NULL, scratch.size = 0;
    void *found = NULL;
    if (posix_memalign(&found, size >= HUGE_PAGE ? HUGE_PAGE : 64, size)) return NULL;
    large_pages(found, size);
    scratch.bytes = found, scratch.size = size;
    pthread_setspecific(scratch_key, found);
    return found;
}

static void take_tasks(work work, void *job, i64 tasks) {
    for (;;) {
        i64 task = atomic_fetch_add(&pool.next, 1);
        if (task >= tasks) return;
        work(job, task);
    }
}

static void *help(void *id) {
    unsigned seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.round == seen || !pool.open || (intptr_t)id >= pool.wanted) {
            seen = pool.round;
            pthread_cond_wait(&pool.wake, &pool.lock);
        }
        seen = pool.round;
        pool.active++;
        work work = pool.work;
        void *job = pool.job;
        i64 tasks = pool.tasks;
        pthread_mutex_unlock(&pool.lock);
        take_tasks(work, job, tasks);
        pthread_mutex_lock(&pool.lock);
        if (--pool.active == 0) pthread_cond_signal(&pool.done);
    }
    return NULL;
}

static void hire(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads of the program */
    while (pool.workers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(intptr_t)pool.workers)) break;
        pthread_detach(thread);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void forget_workers(void) {
    pthread_mutex_init(&pool.lock, NULL);
    pthread_mutex_init(&pool.turn, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.workers = pool.active = pool.open = 0;
}

static void prepare(void) {
    pthread_key_create(&scratch_key, free);
    pthread_atfork(NULL, NULL, forget_workers);
}

static void run(work work, void *job, i64 tasks, int threads) {
    pthread_once(&prepared, prepare);
    threads = (int)min(min(threads, MOST_THREADS), tasks);
    if (threads <= 1 || pthread_mutex_trylock(&pool.turn)) {
        for (i64 task = 0; task < tasks; task++) work(job, task);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    hire(threads - 1);
    pool.work = work, pool.job = job, pool.tasks = tasks;
    pool.wanted = threads - 1, pool.open = 1, pool.round++;
    atomic_store(&pool.next, 0);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_tasks(work, job, tasks);
    pthread_mutex_lock(&pool.lock);
    pool.open = 0;
    while (pool.active) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.turn);
}

#endif
