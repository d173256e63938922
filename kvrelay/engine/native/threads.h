// What all variants of the kernels share: threads, and a clock.
#ifndef KVRELAY_THREADS_H
#define KVRELAY_THREADS_H

#include <stdint.h>

// A task of a parallel loop.
typedef void (*task_function)(void *argument, int64_t task);

// Runs tasks 0 .. num_tasks - 1 < MAX_TASKS on the calling thread and on free threads of the pool.
// Returns when all are done.
enum { MAX_TASKS = 65536 };
void parallel_for(int64_t num_tasks, task_function function, void *argument);

// Threads that currently work on loops, the caller's included.
int64_t num_threads(void);

// Nanoseconds of this process in run_decoder, of any variant.
extern int64_t spent_ns;

#endif
