/*
 * A plain program in C that maps a file and reads its pages at random, beside the neighbours of the benchmark: the
 * contender of `faultless bench --unmodified`, by itself and under `faultless run`. It knows nothing of Faultless.
 *
 *     unmodified FILE BYTES FIRST THREADS SECONDS NEIGHBOUR BALLAST WARM TRACEPOINT
 *
 * It prints "ready" when all is set up, waits for a line, measures, and prints one JSON object. TRACEPOINT is the number of
 * mmap_lock_start_locking, or 0.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/perf_event.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define STEP 0x9E3779B97F4A7C15ull
#define READERS_MAX 4096
/* What the neighbours do: as in neighbour.rs (a test compares them). */
#define CHURN_THREADS 8
#define SMALL (64ul << 10)
#define BIG (1ul << 30)
#define MAP_EVERY_US 1000
/* 32 buckets for each power of two: within 3.2 %. */
#define SUB 32
#define BUCKETS (64 * SUB)

static const unsigned char *map;
static uint64_t pages, past, half_bits, tracepoint;
static _Atomic uint64_t next;
static _Atomic int stop;
static int resident;
static pthread_barrier_t ready, start;

struct reader {
    pthread_t thread;
    uint64_t reads, wrong, locks, first_locks, longest;
    int counted;
    uint64_t times[BUCKETS];
};
static struct reader *readers;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* SplitMix64. */
static uint64_t mix(uint64_t x)
{
    x += STEP;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

/* A random permutation of the page numbers: as in data.rs. */
static uint64_t page_at(uint64_t i)
{
    uint64_t mask = (1ull << half_bits) - 1, x = i;
    do {
        uint64_t left = x >> half_bits, right = x & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint64_t t = left ^ (mix(right ^ (round << 56)) & mask);
            left = right;
            right = t;
        }
        x = left << half_bits | right;
    } while (x >= pages);
    return x;
}

static uint64_t wrong_bytes(const unsigned char *page, uint64_t number)
{
    uint64_t expected = mix(number), seed = expected, differences = 0, word;
    for (uint64_t i = 0; i < PAGE / 8; i++, expected += STEP) {
        memcpy(&word, page + i * 8, 8);
        differences |= word ^ expected;
    }
    if (!differences)
        return 0;
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < PAGE; i++) {
        uint64_t right = seed + STEP * (i / 8);
        wrong += page[i] != (unsigned char)(right >> (i % 8 * 8));
    }
    return wrong;
}

static unsigned bucket(uint64_t ns)
{
    if (ns < SUB)
        return (unsigned)ns;
    unsigned exponent = 63 - (unsigned)__builtin_clzll(ns);
    return (exponent - 4) * SUB + (unsigned)(ns >> (exponent - 5) & (SUB - 1));
}

/* Counts acquisitions of mmap_lock by this thread, or by it and all that it starts. -1 where it may not. */
static int lock_counter(int descendants)
{
    if (!tracepoint)
        return -1;
    struct perf_event_attr attr = { .type = PERF_TYPE_TRACEPOINT, .size = sizeof attr, .config = tracepoint, .inherit = descendants };
    return (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
}
static uint64_t counted(int fd)
{
    uint64_t n = 0;
    return fd >= 0 && read(fd, &n, sizeof n) == sizeof n ? n : 0;
}

static int read_one(struct reader *r)
{
    uint64_t i = next++;
    if (i >= past && !resident)
        return 0;
    uint64_t number = resident ? mix(i) % pages : page_at(i % pages), began = now();
    r->wrong += wrong_bytes(map + number * PAGE, number);
    uint64_t ns = now() - began;
    r->times[bucket(ns)]++;
    if (ns > r->longest)
        r->longest = ns;
    r->reads++;
    return 1;
}

/* A part of all pages, in order. */
static _Atomic uint64_t part;
static void *make_resident(void *unused)
{
    (void)unused;
    for (uint64_t p; (p = part++) * 4096 < pages;)
        for (uint64_t i = p * 4096; i < pages && i < (p + 1) * 4096; i++)
            (void)*(volatile const unsigned char *)(map + i * PAGE);
    return NULL;
}

static void *reader(void *arg)
{
    struct reader *r = arg;
    int fd = lock_counter(0);
    uint64_t none = counted(fd);
    /* The first read is not timed. What it takes of the lock is counted. */
    read_one(r);
    r->first_locks = counted(fd) - none;
    memset(r->times, 0, sizeof r->times);
    r->reads = r->longest = 0;
    pthread_barrier_wait(&ready);
    pthread_barrier_wait(&start);
    uint64_t before = counted(fd);
    while (!stop && read_one(r)) {}
    r->locks = r->first_locks + counted(fd) - before;
    r->counted = fd >= 0;
    return NULL;
}

static void map_touch_unmap(size_t len, int touch)
{
    char *m = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED)
        return;
    for (size_t i = 0; touch && i < len; i += PAGE)
        ((volatile char *)m)[i] = 1;
    munmap(m, len);
}

static _Atomic uint64_t rounds;
static void *churn(void *unused)
{
    (void)unused;
    for (; !stop; rounds++)
        map_touch_unmap(SMALL, 1);
    return NULL;
}
static void *bigfree(void *unused)
{
    (void)unused;
    for (; !stop; rounds++)
        map_touch_unmap(BIG, 1);
    return NULL;
}
static void *smaps(void *unused)
{
    (void)unused;
    for (; !stop; rounds++) {
        map_touch_unmap(SMALL, 0);
        usleep(MAP_EVERY_US);
    }
    return NULL;
}
static void *forks(void *unused)
{
    (void)unused;
    for (; !stop; rounds++) {
        pid_t child = fork();
        if (child == 0)
            _exit(0);
        if (child > 0)
            waitpid(child, NULL, 0);
        else
            usleep(1000);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 10)
        return 2;
    const char *path = argv[1], *neighbour = argv[6];
    uint64_t len = strtoull(argv[2], NULL, 10), ballast = strtoull(argv[7], NULL, 10), warm = strtoull(argv[8], NULL, 10);
    int threads = atoi(argv[4]), n = 0;
    double seconds = atof(argv[5]);
    next = strtoull(argv[3], NULL, 10);
    tracepoint = strtoull(argv[9], NULL, 10);
    pages = len / PAGE;
    /* All pages once, from any of them on. */
    past = next + pages;
    uint64_t bits = 64 - (uint64_t)__builtin_clzll((pages > 2 ? pages : 2) - 1);
    half_bits = (bits + 1) / 2;
    if (threads < 1 || threads > READERS_MAX)
        return 2;

    /* Memory that the machine has not yet been given by its host costs whoever touches it first. */
    if (warm)
        map_touch_unmap(warm, 1);
    volatile char *held = ballast ? mmap(NULL, ballast, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : NULL;
    if (held == MAP_FAILED)
        die("mmap of memory");
    for (uint64_t i = 0; i < ballast; i += PAGE)
        held[i] = 1;

    int process = lock_counter(1);
    int fd = open(path, O_RDONLY);
    if (fd < 0)
        die(path);
    map = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        die("mmap");
    close(fd);
    resident = !strcmp(neighbour, "writer");
    if (resident) {
        pthread_t helpers[4];
        for (int i = 0; i < 4; i++)
            if (pthread_create(&helpers[i], NULL, make_resident, NULL))
                die("pthread_create");
        for (int i = 0; i < 4; i++)
            pthread_join(helpers[i], NULL);
    }
    madvise((void *)map, len, MADV_RANDOM);

    void *(*disturb)(void *) = !strcmp(neighbour, "churn") ? churn : !strcmp(neighbour, "smaps") ? smaps : !strcmp(neighbour, "fork") ? forks
                             : !strcmp(neighbour, "bigfree") ? bigfree : NULL;
    pthread_t neighbours[CHURN_THREADS];
    for (; disturb && n < (disturb == churn ? CHURN_THREADS : 1); n++)
        if (pthread_create(&neighbours[n], NULL, disturb, NULL))
            die("pthread_create");
    readers = calloc((size_t)threads, sizeof *readers);
    struct rusage before_first, u0, u1;
    getrusage(RUSAGE_SELF, &before_first);
    pthread_barrier_init(&ready, NULL, (unsigned)threads + 1);
    pthread_barrier_init(&start, NULL, (unsigned)threads + 1);
    for (int i = 0; i < threads; i++)
        if (pthread_create(&readers[i].thread, NULL, reader, &readers[i]))
            die("pthread_create");
    pthread_barrier_wait(&ready);
    printf("ready\n");
    fflush(stdout);
    char line[16];
    if (!fgets(line, sizeof line, stdin))
        return 1;

    getrusage(RUSAGE_SELF, &u0);
    uint64_t locks = counted(process), rounds0 = rounds, began = now();
    pthread_barrier_wait(&start);
    uint64_t open_ns = 0;
    while (now() - began < (uint64_t)(seconds * 1e9) && (next < past || resident)) {
        usleep(1000);
        if (resident && !open_ns && now() - began > (uint64_t)(seconds * 5e8)) {
            uint64_t before = now();
            int writer = open(path, O_RDWR);
            open_ns = now() - before;
            if (writer < 0)
                die(path);
            close(writer);
        }
    }
    stop = 1;
    uint64_t reads = 0, wrong = 0, reader_locks = 0, longest = 0;
    int all_counted = 1;
    for (int i = 0; i < threads; i++)
        pthread_join(readers[i].thread, NULL);
    double took = (double)(now() - began) / 1e9;
    locks = counted(process) - locks;
    getrusage(RUSAGE_SELF, &u1);
    double per_s = (double)(rounds - rounds0) / took;
    for (int i = 0; i < n; i++)
        pthread_join(neighbours[i], NULL);
    static uint64_t times[BUCKETS];
    for (int i = 0; i < threads; i++) {
        reads += readers[i].reads;
        wrong += readers[i].wrong;
        reader_locks += readers[i].locks;
        locks += readers[i].first_locks;
        all_counted &= readers[i].counted;
        if (readers[i].longest > longest)
            longest = readers[i].longest;
        for (int b = 0; b < BUCKETS; b++)
            times[b] += readers[i].times[b];
    }
#define SECONDS(t) ((double)(t).tv_sec + (double)(t).tv_usec / 1e6)
    double cpu = SECONDS(u1.ru_utime) + SECONDS(u1.ru_stime) - SECONDS(u0.ru_utime) - SECONDS(u0.ru_stime);
    printf("{\"seconds\": %f, \"reads\": %lu, \"wrong\": %lu, \"major_faults\": %lu, \"first_major_faults\": %lu, \"cpu_s\": %f, \"rounds_per_s\": %f, \"longest_ns\": %lu, \"open_ns\": %lu, ",
           took, reads, wrong, (uint64_t)(u1.ru_majflt - u0.ru_majflt), (uint64_t)(u0.ru_majflt - before_first.ru_majflt), cpu, per_s, longest, open_ns);
    if (process >= 0 && all_counted)
        printf("\"locks_readers\": %lu, \"locks_process\": %lu, ", reader_locks, locks);
    printf("\"times\": [");
    const char *comma = "";
    for (uint64_t b = 0; b < BUCKETS; b++)
        if (times[b]) {
            /* The upper end of the bucket. */
            uint64_t exponent = b / SUB + 4, end = b < SUB ? b + 1 : (SUB + b % SUB + 1) << (exponent - 5);
            printf("%s[%lu, %lu]", comma, end, times[b]);
            comma = ", ";
        }
    printf("]}\n");
    return 0;
}
