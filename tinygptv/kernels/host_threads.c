/* Threads for loops of some 10 to 1000 microseconds, several hundred per token of an answer.
 *
 * OpenMP's threads meet at the end of every loop, and spin there or sleep by one setting for the whole process. Spinning
 * stalls on cores that others use; sleeping costs a tenth of a step in wake-ups. These spin for some 50 microseconds,
 * which covers the pause between two loops of a step, then sleep.
 */
#include "host_threads.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define MOST_WORKERS 255
#define SPINS 1500 /* pauses, of 15 to 45 nanoseconds each */

#define POOLS 2 /* callers at the same time: a step of the language model and the image encoder */

/* What is left of a thread's share of a loop: the loop's number in the upper half, the next item in the lower. A late worker
 * cannot take an item of a loop that it has not seen. */
typedef struct {
    _Alignas(64) _Atomic uint64_t next;
} Share;

/* Workers that do one loop at a time. The caller's share is the first. */
typedef struct {
    pthread_mutex_t caller, sleep;
    pthread_cond_t wake;
    atomic_int sleeping, workers, threads;
    Share shares[MOST_WORKERS + 1];
    _Atomic int64_t count, done;
    void (*_Atomic work)(void *, int64_t);
    void *_Atomic argument;
} Pool;

typedef struct {
    Pool *pool;
    int number;
} Worker;

#define NEW_POOL {.caller = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER}
static Pool pools[POOLS] = {NEW_POOL, NEW_POOL};
static Worker all_workers[POOLS][MOST_WORKERS];

/* The number of the loop at hand: the caller's share is the last to be handed out. */
static uint64_t current_loop(Pool *pool) { return atomic_load(&pool->shares[0].next) >> 32; }

static int64_t first_of_share(int share, int threads, int64_t count) { return count * share / threads; }

/* Take and do the items of a share while there are any. */
static void take_share(Pool *pool, uint64_t loop, int share) {
    for (;;) {
        uint64_t next = atomic_load(&pool->shares[share].next);
        void (*work)(void *, int64_t) = atomic_load(&pool->work);
        void *argument = atomic_load(&pool->argument);
        const int64_t end = first_of_share(share + 1, atomic_load(&pool->threads), atomic_load(&pool->count));
        if (next >> 32 != loop || (int64_t)(uint32_t)next >= end) return;
        /* Succeeds only while the loop is the one that `work` was read for. */
        if (!atomic_compare_exchange_weak(&pool->shares[share].next, &next, next + 1)) continue;
        work(argument, (uint32_t)next);
        atomic_fetch_add(&pool->done, 1);
    }
}

/* Do one's own share of a loop, whose items lie side by side in memory, then what others have not come to. */
static void take_items(Pool *pool, uint64_t loop, int own) {
    const int threads = atomic_load(&pool->threads);
    for (int i = 0; i < threads; i++) take_share(pool, loop, (own + i) % threads);
}

static uint64_t await_loop(Pool *pool, uint64_t last) {
    for (int i = 0; i < SPINS; i++) {
        if (current_loop(pool) != last) return current_loop(pool);
        _mm_pause();
    }
    pthread_mutex_lock(&pool->sleep);
    atomic_fetch_add(&pool->sleeping, 1);
    while (current_loop(pool) == last) pthread_cond_wait(&pool->wake, &pool->sleep);
    atomic_fetch_sub(&pool->sleeping, 1);
    pthread_mutex_unlock(&pool->sleep);
    return current_loop(pool);
}

static void *run_worker(void *argument) {
    const Worker *worker = argument;
    Pool *pool = worker->pool;
    uint64_t last = 0;
    for (;;) {
        last = await_loop(pool, last);
        if (worker->number < atomic_load(&pool->threads)) take_items(pool, last, worker->number);
    }
    return NULL;
}

/* Start workers that are missing; fewer are no error, others do their share. */
static void start_workers(Pool *pool, int wanted) {
    for (int n = atomic_load(&pool->workers); n < wanted && n < MOST_WORKERS; n++) {
        pthread_t thread;
        Worker *worker = &all_workers[pool - pools][n];
        *worker = (Worker){pool, n + 1};
        if (pthread_create(&thread, NULL, run_worker, worker)) return;
        pthread_detach(thread);
        atomic_store(&pool->workers, n + 1);
    }
}

/* A forked process has none of the workers, and locks that they may have held; their loop is its parent's. */
static void forget_workers(void) {
    for (Pool *pool = pools; pool < pools + POOLS; pool++) {
        pthread_mutex_init(&pool->caller, NULL);
        pthread_mutex_init(&pool->sleep, NULL);
        pthread_cond_init(&pool->wake, NULL);
        atomic_store(&pool->sleeping, 0);
        atomic_store(&pool->workers, 0);
        for (int i = 0; i <= MOST_WORKERS; i++) atomic_store(&pool->shares[i].next, 0);
    }
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

/* A pool that nobody uses, locked for the caller, or NULL. */
static Pool *take_pool(void) {
    for (int i = 0; i < POOLS; i++)
        if (!pthread_mutex_trylock(&pools[i].caller)) return &pools[i];
    return NULL;
}

void share_items(void (*work)(void *argument, int64_t item), void *argument, int64_t count, int threads) {
    Pool *pool = threads > 1 && count > 1 ? take_pool() : NULL;
    if (!pool) {
        for (int64_t i = 0; i < count; i++) work(argument, i);
        return;
    }
    if (threads > MOST_WORKERS + 1) threads = MOST_WORKERS + 1;
    start_workers(pool, threads - 1);
    const uint64_t loop = (current_loop(pool) + 1) & UINT32_MAX;
    const int before = atomic_load(&pool->threads), most = before > threads ? before : threads;
    /* Nothing to take while the fields change. */
    for (int i = 0; i < most; i++) atomic_store(&pool->shares[i].next, (loop - 1) << 32 | UINT32_MAX);
    atomic_store(&pool->work, work);
    atomic_store(&pool->argument, argument);
    atomic_store(&pool->threads, threads);
    atomic_store(&pool->done, 0);
    atomic_store(&pool->count, count);
    for (int i = threads - 1; i >= 0; i--) atomic_store(&pool->shares[i].next, loop << 32 | first_of_share(i, threads, count));
    if (atomic_load(&pool->sleeping)) {
        pthread_mutex_lock(&pool->sleep);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->sleep);
    }
    take_items(pool, loop, 0);
    for (int i = 0; atomic_load(&pool->done) < count; i++) {
        if (i < SPINS) _mm_pause();
        else sched_yield(); /* a worker lost its core in the middle of an item */
    }
    pthread_mutex_unlock(&pool->caller);
}
