/* Several threads for the parts of a task: torch's own, where OpenMP's GOMP_parallel is to be found in the process.

Between two of its products torch's threads spin for a while, and a thread of ours beside them waits for a core: two
threads then took five times as long as one. Elsewhere each call has threads of its own. */

#define _GNU_SOURCE /* RTLD_DEFAULT */
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define MOST 256 /* parts, and threads */

typedef struct {
    void (*work)(void *);
    char *parts;
    size_t size; /* bytes a part */
    int64_t count, next;
} Team;

/* What every thread does; so all is done however many there are. */
static void take_parts(void *given) {
    Team *team = given;
    int64_t k;
    while ((k = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->count)
        team->work(team->parts + k * team->size);
}

static void *take_parts_too(void *team) {
    take_parts(team);
    return NULL;
}

/* How many parts are worth it: `threads` at most, each with `share` of the `work` or more. */
static int64_t worth(int64_t threads, int64_t work, int64_t share) {
    if (threads > work / share) threads = work / share;
    return threads > MOST ? MOST : threads < 1 ? 1 : threads;
}

/* work(part) for each of `count` parts of `size` bytes, at most MOST. */
static void in_parts(void (*work)(void *), void *parts, size_t size, int64_t count) {
    Team team = {work, parts, size, count, 0};
    void (*openmp)(void (*)(void *), void *, unsigned, unsigned) = NULL;
    if (count > 1) *(void **)&openmp = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (openmp) {
        openmp(take_parts, &team, (unsigned)count, 0);
        return;
    }
    pthread_t started[MOST];
    int64_t begun = 0;
    while (begun < count - 1 && !pthread_create(&started[begun], NULL, take_parts_too, &team)) begun++;
    take_parts(&team);
    for (int64_t k = 0; k < begun; k++) pthread_join(started[k], NULL);
}
