// The pool of threads that run parallel loops. One loop at a time; called by one engine thread.
//
// A loop is a ticket (generation, number of tasks, next task) in one 64-bit word. A free thread
// claims the next task by compare-and-set, so it cannot claim one of a loop that has ended.
//
// Helpers run on this process's own cores. Borrowers run on cores of other processes while these
// are idle. All processes share an activity table of when each core's owner last worked there. A
// borrower reads it before each task, so an owner waits for one task at most, about 100 us.
#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>
#if defined(__linux__)
#include <sched.h>
#endif

enum {
    MAX_HELPERS = 255,
    NUM_SPINS = 4000,          // about 100 us: longer than the pause between two loops of a step
    IDLE_NS = 3000000,         // longer than the pause between two steps of a busy worker
    LOOK_INTERVAL_NS = 500000  // how often the caller looks for idle cores
};

static _Atomic uint64_t ticket;  // generation << 32 | num_tasks << 16 | next
static _Atomic int64_t num_done;
static task_function loop_function;
static void *loop_argument;

typedef struct {
    pthread_t thread;
    int64_t core;       // -1: not pinned
    int borrower;
    _Atomic int enabled, asleep;
} helper;

static helper helpers[MAX_HELPERS];
static int num_helpers, num_borrowers;
static _Atomic int stopping;
static pthread_mutex_t sleep_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_condition = PTHREAD_COND_INITIALIZER;

// [core]: when its owner last worked there; one cache line each. NULL: cores are not shared.
typedef struct {
    _Atomic int64_t worked_ns;
    char padding[56];
} core_activity;
static core_activity *activity;
static int64_t caller_core;
static int64_t looked_ns;

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");  // `yield` takes no time on most
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void record_work(int64_t core) {
    if (activity != NULL && core >= 0) atomic_store_explicit(&activity[core].worked_ns, now_ns(), memory_order_relaxed);
}

static int is_idle(int64_t core) {
    return now_ns() - atomic_load_explicit(&activity[core].worked_ns, memory_order_relaxed) > IDLE_NS;
}

// Runs tasks of the current loop until none is left, or until a borrower has to leave.
static void run_tasks(int64_t core, int borrower) {
    uint64_t seen = atomic_load_explicit(&ticket, memory_order_acquire);
    for (;;) {
        uint64_t next = seen & 0xffff, num_tasks = seen >> 16 & 0xffff;
        if (next >= num_tasks) return;
        if (borrower && !is_idle(core)) return;
        if (!atomic_compare_exchange_weak_explicit(&ticket, &seen, seen + 1, memory_order_acq_rel, memory_order_acquire)) continue;
        if (!borrower) record_work(core);
        // The loop cannot end before this task, so its function and argument are still valid.
        loop_function(loop_argument, (int64_t)next);
        atomic_fetch_add_explicit(&num_done, 1, memory_order_release);
        seen = atomic_load_explicit(&ticket, memory_order_acquire);
    }
}

static int has_tasks(void) {
    uint64_t seen = atomic_load_explicit(&ticket, memory_order_acquire);
    return (seen & 0xffff) < (seen >> 16 & 0xffff);
}

static int may_help(const helper *me) { return atomic_load(&me->enabled) && has_tasks(); }

static void sleep_until_wanted(helper *me) {
    pthread_mutex_lock(&sleep_mutex);
    atomic_store(&me->asleep, 1);
    while (!may_help(me) && !atomic_load(&stopping)) pthread_cond_wait(&sleep_condition, &sleep_mutex);
    atomic_store(&me->asleep, 0);
    pthread_mutex_unlock(&sleep_mutex);
}

static void *help(void *argument) {
    helper *me = argument;
    while (!atomic_load(&stopping)) {
        for (int spins = 0; atomic_load(&me->enabled) && !has_tasks() && spins < NUM_SPINS; spins++) pause_briefly();
        if (!may_help(me)) sleep_until_wanted(me);
        if (me->borrower && !is_idle(me->core)) {
            atomic_store(&me->enabled, 0);
            continue;
        }
        run_tasks(me->core, me->borrower);
    }
    return NULL;
}

static void wake_all(void) {
    pthread_mutex_lock(&sleep_mutex);
    pthread_cond_broadcast(&sleep_condition);
    pthread_mutex_unlock(&sleep_mutex);
}

// Enables the borrowers whose cores have become idle.
static void look_for_idle_cores(void) {
    int64_t now = now_ns();
    if (now - looked_ns < LOOK_INTERVAL_NS) return;
    looked_ns = now;
    for (int i = num_helpers - num_borrowers; i < num_helpers; i++)
        if (!atomic_load(&helpers[i].enabled) && is_idle(helpers[i].core)) atomic_store(&helpers[i].enabled, 1);
}

static void wake_helpers(void) {
    for (int i = 0; i < num_helpers; i++)
        if (atomic_load(&helpers[i].enabled) && atomic_load(&helpers[i].asleep)) {
            wake_all();
            return;
        }
}

int64_t num_threads(void) {
    int64_t number = 1;
    for (int i = 0; i < num_helpers; i++) number += atomic_load_explicit(&helpers[i].enabled, memory_order_relaxed);
    return number;
}

void parallel_for(int64_t num_tasks, task_function function, void *argument) {
    if (num_borrowers > 0) look_for_idle_cores();
    if (num_tasks <= 1 || num_helpers == 0) {
        record_work(caller_core);
        for (int64_t i = 0; i < num_tasks; i++) function(argument, i);
        return;
    }
    loop_function = function;
    loop_argument = argument;
    atomic_store_explicit(&num_done, 0, memory_order_relaxed);
    uint64_t generation = (atomic_load_explicit(&ticket, memory_order_relaxed) >> 32) + 1;
    atomic_store(&ticket, generation << 32 | (uint64_t)num_tasks << 16);
    wake_helpers();
    run_tasks(caller_core, 0);
    while (atomic_load_explicit(&num_done, memory_order_acquire) < num_tasks) pause_briefly();
}

// ---------------------------------------------------------------- set-up

static void pin(pthread_t thread, int64_t core) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(thread, sizeof(set), &set);  // on failure it runs anywhere
#else
    (void)thread, (void)core;
#endif
}

static int add_helper(int64_t core, int borrower) {
    if (num_helpers == MAX_HELPERS) return 0;
    helper *h = &helpers[num_helpers];
    h->core = core;
    h->borrower = borrower;
    atomic_store(&h->enabled, !borrower);
    atomic_store(&h->asleep, 0);
    if (pthread_create(&h->thread, NULL, help, h) != 0) return 0;
    if (core >= 0) pin(h->thread, core);
    num_helpers++;
    return 1;
}

static void stop_helpers(void) {
    atomic_store(&stopping, 1);
    wake_all();
    for (int i = 0; i < num_helpers; i++) pthread_join(helpers[i].thread, NULL);
    num_helpers = num_borrowers = 0;
    atomic_store(&stopping, 0);
}

// Sets this process's threads, the caller's included, and returns their number. Not within a loop.
//   cores: of the caller, then of helpers; further helpers are not pinned
//   borrowed_cores: of other processes; one borrower each, if there is a table
//   activity_table: 64 bytes for each core number below table_cores; or NULL
int64_t set_threads(
    int64_t num_threads, const int64_t *cores, int64_t num_cores, const int64_t *borrowed_cores, int64_t num_borrowed_cores,
    void *activity_table, int64_t table_cores) {
    stop_helpers();
    activity = activity_table;
    caller_core = num_cores > 0 && cores[0] < table_cores ? cores[0] : -1;
    for (int64_t i = 1; i < num_threads; i++)
        if (!add_helper(i < num_cores ? cores[i] : -1, 0)) break;
    for (int64_t i = 0; activity != NULL && i < num_borrowed_cores; i++)
        if (borrowed_cores[i] < table_cores && add_helper(borrowed_cores[i], 1)) num_borrowers++;
    return num_helpers + 1;
}
