// The pool of threads that run parallel loops. One loop at a time; called by one engine thread.
//
// A loop is a ticket (generation, number of tasks, next task) in one 64-bit word. Whoever is free claims the next task by
// compare-and-set, so a helper that comes late, or not at all, delays nobody, and none can claim a task of a loop that has ended.
#define _GNU_SOURCE
#include "kernels.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#if defined(__linux__)
#include <sched.h>
#endif

enum { MAX_HELPERS = 255, NUM_SPINS = 4000 };

static _Atomic uint64_t ticket;  // generation << 32 | num_tasks << 16 | next
static _Atomic int64_t num_done;
static task_function job_function;
static void *job_argument;

static int num_helpers;
static pthread_t helpers[MAX_HELPERS];
static _Atomic int num_sleeping;
static pthread_mutex_t sleep_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_condition = PTHREAD_COND_INITIALIZER;
static _Atomic int stopping;

static void pause_briefly(void) {
#if HAVE_AVX2
    _mm_pause();
#endif
}

// Claims and runs tasks of the current loop until none is left.
static void work(void) {
    uint64_t seen = atomic_load_explicit(&ticket, memory_order_acquire);
    for (;;) {
        uint64_t next = seen & 0xffff, num_tasks = seen >> 16 & 0xffff;
        if (next >= num_tasks) return;
        if (!atomic_compare_exchange_weak_explicit(&ticket, &seen, seen + 1, memory_order_acq_rel, memory_order_acquire)) continue;
        // The loop cannot end before this task has, so its function and argument are still there.
        job_function(job_argument, (int64_t)next);
        atomic_fetch_add_explicit(&num_done, 1, memory_order_release);
        seen = atomic_load_explicit(&ticket, memory_order_acquire);
    }
}

static int has_work(void) {
    uint64_t seen = atomic_load_explicit(&ticket, memory_order_acquire);
    return (seen & 0xffff) < (seen >> 16 & 0xffff);
}

static void *help(void *unused) {
    (void)unused;
    while (!atomic_load(&stopping)) {
        int spins = 0;
        while (!has_work() && spins < NUM_SPINS && !atomic_load(&stopping)) {
            pause_briefly();
            spins++;
        }
        if (!has_work() && !atomic_load(&stopping)) {
            pthread_mutex_lock(&sleep_mutex);
            atomic_fetch_add(&num_sleeping, 1);
            while (!has_work() && !atomic_load(&stopping)) pthread_cond_wait(&sleep_condition, &sleep_mutex);
            atomic_fetch_sub(&num_sleeping, 1);
            pthread_mutex_unlock(&sleep_mutex);
        }
        work();
    }
    return NULL;
}

static void wake_helpers(void) {
    if (atomic_load(&num_sleeping) == 0) return;
    pthread_mutex_lock(&sleep_mutex);
    pthread_cond_broadcast(&sleep_condition);
    pthread_mutex_unlock(&sleep_mutex);
}

static void pin(pthread_t thread, int64_t core) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(thread, sizeof(set), &set);  // fails where the core is not ours: then it runs anywhere
#else
    (void)thread, (void)core;
#endif
}

// Sets the number of threads, the caller's included; the others run on `cores`, one on each, as far as these go.
// Returns how many there are.
int64_t set_num_threads(int64_t num_threads, const int64_t *cores, int64_t num_cores) {
    atomic_store(&stopping, 1);
    pthread_mutex_lock(&sleep_mutex);
    pthread_cond_broadcast(&sleep_condition);
    pthread_mutex_unlock(&sleep_mutex);
    for (int i = 0; i < num_helpers; i++) pthread_join(helpers[i], NULL);
    num_helpers = 0;
    atomic_store(&stopping, 0);
    while (num_helpers < num_threads - 1 && num_helpers < MAX_HELPERS) {
        if (pthread_create(&helpers[num_helpers], NULL, help, NULL) != 0) break;
        if (num_helpers < num_cores) pin(helpers[num_helpers], cores[num_helpers]);
        num_helpers++;
    }
    return num_helpers + 1;
}

void parallel_for(int64_t num_tasks, task_function function, void *argument) {
    if (num_tasks <= 1 || num_helpers == 0) {
        for (int64_t i = 0; i < num_tasks; i++) function(argument, i);
        return;
    }
    job_function = function;
    job_argument = argument;
    atomic_store_explicit(&num_done, 0, memory_order_relaxed);
    uint64_t generation = (atomic_load_explicit(&ticket, memory_order_relaxed) >> 32) + 1;
    atomic_store(&ticket, generation << 32 | (uint64_t)num_tasks << 16);
    wake_helpers();
    work();
    while (atomic_load_explicit(&num_done, memory_order_acquire) < num_tasks) pause_briefly();
}
