/* Threads that share the items of a loop. */
#pragma once

#include <stdint.h>

/* Call work(argument, i) for i in 0..count-1, on up to `threads` threads, the caller among them.
 *
 * Each thread has a share of neighbouring items, which it takes one at a time; who has none left takes those of others. So
 * nobody waits for a thread without a core: on a machine that is busy with other processes, the caller does its items.
 * Two callers have threads of their own; a third one at the same time does everything itself. */
void share_items(void (*work)(void *argument, int64_t item), void *argument, int64_t count, int threads);
