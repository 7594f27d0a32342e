/* Several threads for the parts of a task: torch's own, where OpenMP is to be found in the process.

Between two of its products torch's threads spin for a while, and a thread of ours beside them waits for a core: two
threads then took five times as long as one. A thread of OpenMP takes the part of its number, as it does in torch's
products, which then find in its cache what it made. Elsewhere each call has threads of its own. */

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
    int64_t count;
    int (*number)(void), (*members)(void);
} Team;

static void take_parts(void *given) {
    const Team *team = given;
    for (int64_t k = team->number(); k < team->count; k += team->members()) team->work(team->parts + k * team->size);
}

typedef struct {
    void (*work)(void *);
    void *part;
    pthread_t thread;
} Started;

static void *take_one(void *given) {
    const Started *started = given;
    started->work(started->part);
    return NULL;
}

/* How many parts are worth it: `threads` at most, each with `share` of the `work` or more. */
static int64_t worth(int64_t threads, int64_t work, int64_t share) {
    if (threads > work / share) threads = work / share;
    return threads > MOST ? MOST : threads < 1 ? 1 : threads;
}

/* work(part) for each of `count` parts of `size` bytes, at most MOST. */
static void in_parts(void (*work)(void *), void *parts, size_t size, int64_t count) {
    Team team = {work, parts, size, count, NULL, NULL};
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = NULL;
    if (count > 1) {
        *(void **)&parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
        *(void **)&team.number = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
        *(void **)&team.members = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
    }
    if (parallel && team.number && team.members) {
        parallel(take_parts, &team, (unsigned)count, 0);
        return;
    }
    Started started[MOST];
    int64_t begun = 0;
    for (; begun < count - 1; begun++) {
        started[begun] = (Started){work, team.parts + begun * size, 0};
        if (pthread_create(&started[begun].thread, NULL, take_one, &started[begun])) break;
    }
    for (int64_t k = begun; k < count; k++) work(team.parts + k * size); /* the last, and those that got no thread */
    for (int64_t k = 0; k < begun; k++) pthread_join(started[k].thread, NULL);
}
